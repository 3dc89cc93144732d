"""Generates candidate cells for a grid: new shapes from the iso-N_total solver."""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np

from moe_jax import arch as arch_lib
from moe_jax.arch import count
from moe_jax.config import RunConfig
from moe_jax.errors import FieldError, require
from moe_jax.laws.table import ARCHITECTURE
from moe_jax.study.sample import variables

# Log distance below which values were meant to be equal: rounding barely moves sizes, but moves
# granularity by up to a quarter.
_SAME_SIZE, _SAME_GRANULARITY = math.log(1.1), math.log(1.25)
_FINEST = 64


@dataclasses.dataclass(frozen=True)
class Region:
  """Where to generate candidates: every combination of these values; see `region`.

  Attributes:
    n_total, n_exp, sparsity, granularity: values to combine.
    aspect: d_model / n_layers to hold fixed; None holds n_layers fixed instead.
    n_layers: depth to hold fixed if aspect is None; None takes that of the nearest run.
  """

  n_total: tuple[int, ...]
  n_exp: tuple[int, ...]
  sparsity: tuple[float, ...]
  granularity: tuple[float, ...]
  aspect: float | None = None
  n_layers: int | None = None

  def __post_init__(self):
    for name in ("n_total", "n_exp", "sparsity"):
      for value in getattr(self, name):
        require(value >= 1, name, value, "must be at least 1")
    for value in self.granularity:  # below 1 if experts are wider than the model
      require(value > 0, "granularity", value, "must be above 0")
    require(self.aspect is None or self.aspect > 0, "aspect", self.aspect, "must be above 0")
    require(self.n_layers is None or self.n_layers >= 1, "n_layers", self.n_layers,
            "must be at least 1")
    require(self.aspect is None or self.n_layers is None, "aspect", self.aspect,
            "and n_layers cannot both be held fixed")

  def __str__(self) -> str:
    def listed(values) -> str:
      return ", ".join(f"{value:g}" for value in values)

    held = (f"d_model / n_layers {self.aspect:.3g}" if self.aspect else
            f"n_layers {self.n_layers}" if self.n_layers else "n_layers of the nearest run")
    return (f"n_total {listed(self.n_total)}; n_exp {listed(self.n_exp)}; s "
            f"{listed(self.sparsity)}; g {listed(self.granularity)}; fixed {held}")


def region(configs: Sequence[RunConfig], **asked) -> Region:
  """Returns the region around the runs so far; fields given in `asked` (not None) override it.

  Sizes and granularities are those of the runs; n_exp and sparsity extend one halving and one
  doubling beyond theirs. n_layers is held fixed if every size has a single depth, else the aspect.
  """
  archs = [config.arch for config in configs]
  sizes = np.array([count.n_total(arch) for arch in archs], float)
  near = {"n_total": tuple(int(float(f"{n:.3g}")) for n in _clustered(sizes, _SAME_SIZE)),
          "n_exp": tuple(int(e) for e in _widened([arch.n_exp for arch in archs])),
          "sparsity": _widened([arch.sparsity for arch in archs]),
          "granularity": tuple(float(f"{g:.2g}") for g in
                               _clustered([arch.granularity for arch in archs],
                                          _SAME_GRANULARITY))}
  given = {name: value for name, value in asked.items() if value is not None}
  if not {"aspect", "n_layers"} & set(given):
    groups = _groups(sizes, _SAME_SIZE)
    if any(len({archs[i].n_layers for i in group}) > 1 for group in groups):
      given["aspect"] = mean_aspect(configs)
  return Region(**(near | given))


def mean_aspect(configs: Sequence[RunConfig]) -> float:
  """Returns the geometric mean of d_model / n_layers."""
  return float(np.exp(np.mean([math.log(c.arch.d_model / c.arch.n_layers) for c in configs])))


def _groups(values, apart: float) -> list[np.ndarray]:
  """Groups the indices of values, ascending, splitting at gaps in the logs above `apart`."""
  order = np.argsort(values)
  return np.split(order, np.flatnonzero(np.diff(np.log(values)[order]) > apart) + 1)


def _clustered(values, apart: float) -> list[float]:
  """Returns the geometric mean of each group."""
  return [float(np.exp(np.mean(np.log(np.array(values)[group]))))
          for group in _groups(np.array(values), apart)]


def _widened(values) -> tuple[float, ...]:
  values = sorted(set(values))
  return tuple(v for v in (values[0] / 2, *values, values[-1] * 2) if v > 1)


@dataclasses.dataclass(frozen=True)
class Candidates:
  """New cells.

  Attributes:
    configs: one run of each.
    unsolved: number of combinations without a shape of that size and granularity.
    refused: the error of each combination that makes no valid configuration.
  """

  configs: tuple[RunConfig, ...]
  unsolved: int
  refused: tuple[str, ...]


def new_cells(where: Region, configs: Sequence[RunConfig]) -> Candidates:
  """Solves for a cell of each combination, with the recipe of its nearest run (see `nearest`).

  Widths keep to the power of two that divides all widths so far. Shapes that already have runs
  are skipped.
  """
  seen = {_shape(config) for config in configs}
  limits = _limits(configs)
  found, refused, unsolved = {}, [], 0
  for n_total, n_exp, s, g in itertools.product(where.n_total, where.n_exp, where.sparsity,
                                                where.granularity):
    if n_exp % s or n_exp < s:
      continue
    like = nearest(configs, n_total, n_exp, s, g)
    depth = ({"aspect": where.aspect} if where.aspect
             else {"n_layers": where.n_layers or like.arch.n_layers})
    solved = arch_lib.solve_grid(template=like.arch, n_total=n_total, n_exp=n_exp,
                                 n_topk=int(n_exp / s), granularity=g, limits=limits, **depth)
    if not solved.solved[0]:
      unsolved += 1
      continue
    try:
      config = like_run(like, solved[0].arch, min(c.seed_init for c in configs))
    except FieldError as error:
      refused.append(str(error))
      continue
    if _shape(config) not in seen:
      found.setdefault(_shape(config), config)
  return Candidates(tuple(found.values()), unsolved, tuple(refused))


def _shape(config: RunConfig) -> tuple[float, ...]:
  known = variables(config)
  return tuple(known[name] for name in ARCHITECTURE)


def like_run(run: RunConfig, arch: arch_lib.Architecture, seed_init: int) -> RunConfig:
  """Returns a run's recipe with another architecture or seed, as a separate run, not a branch."""
  return dataclasses.replace(
      run, arch=arch, seed_init=seed_init,
      train=dataclasses.replace(run.train, branch_from=None),
      execution=dataclasses.replace(run.execution, keep_steps=()))


def nearest(configs: Sequence[RunConfig], n_total: float, n_exp: float, s: float,
            g: float) -> RunConfig:
  """Returns the nearest run in the logs of all four; ties go to the one trained longest."""
  def distance(config: RunConfig) -> tuple[float, int]:
    arch = config.arch
    ours = (count.n_total(arch), arch.n_exp, arch.sparsity, arch.granularity)
    apart = math.dist(np.log(ours), np.log((n_total, n_exp, s, g)))
    return round(apart, 6), -config.train.steps * config.batch_tokens

  return min(configs, key=distance)


def _limits(configs: Sequence[RunConfig]) -> arch_lib.IsoLimits:
  """Limits widths to the largest power of two (at most 64) that divides all widths so far."""
  multiples = [math.gcd(_FINEST, *(getattr(c.arch, name) for c in configs))
               for name in ("d_model", "d_expert")]
  return arch_lib.IsoLimits(d_model_multiple=multiples[0], d_expert_multiple=multiples[1])


def flops(config: RunConfig) -> float:
  """Returns the training FLOPs of one run."""
  return (config.train.steps * config.batch_tokens
          * count.training_flops_per_token(config.arch, config.data.seq_len))
