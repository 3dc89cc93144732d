"""Compares the architecture a fitted law chooses for a budget with random ones of that budget."""

import dataclasses
import math
import random
from collections.abc import Sequence

import numpy as np

from moe_jax.arch import count
from moe_jax.arch.architecture import Architecture
from moe_jax.config import RunConfig, identity_hash
from moe_jax.design.ask import Question, ask
from moe_jax.design.inference import Serving
from moe_jax.design.space import Space
from moe_jax.errors import FieldError, require
from moe_jax.grid import Grid, cell_name
from moe_jax.laws.fit import Fit
from moe_jax.laws.shape import Shape
from moe_jax.laws.table import UNUSED, Row
from moe_jax.study import candidates
from moe_jax.study.rates import Rates
from moe_jax.study.so_far import SoFar
from moe_jax.text import aligned, short

# Fraction of each budget that an architecture must use to count as one of that budget.
LEAST = {"memory_gb": 0.9, "active_params": 0.75}
_HEAD = 8  # width of the stand-in heads if the runs' own heads fill d_model


@dataclasses.dataclass(frozen=True)
class Contest:
  """The law's choice and random architectures of the same budget.

  Attributes:
    configs: the choice, then the others.
    predicted: the losses the law predicts for them.
    notes: lines on the budget and on the population drawn from.
  """

  configs: tuple[RunConfig, ...]
  predicted: np.ndarray
  notes: tuple[str, ...]

  def lines(self, recipe: RunConfig) -> list[str]:
    rows = [("", "cell", "N_total", "N_active", "s", "g", "predicted")]
    for i, (config, loss) in enumerate(zip(self.configs, self.predicted, strict=True)):
      arch = config.arch
      rows.append(("other" if i else "choice", cell_name(config, recipe),
                   short(count.n_total(arch)), short(count.n_active(arch)),
                   f"{arch.sparsity:g}", f"{arch.granularity:.3g}", f"{loss:.4f}"))
    return [*self.notes, *aligned(rows, left=(0, 1))]


def contest(fitted: Fit, history: SoFar, memory_gb: float, active_params: float, others: int = 10,
            seed: int = 0, rates: Rates | None = None) -> Contest:
  """Chooses an architecture, and draws the others uniformly over pairs (n_exp, n_topk).

  The space covers the runs' ranges of n_exp, n_topk, granularity and d_model / n_layers, with
  widths in multiples of lcm(8, 2 n_heads). Each architecture is trained with the recipe of its
  nearest run, at the learning rate that `rates` gives if there is one.

  Raises:
    FieldError: the space cannot meet the budget, or too few architectures use it up.
  """
  require(others >= 1, "others", others, "must be at least 1")
  tokens = float(fitted.cells.columns["tokens"].max())
  like = history.configs[0]
  serving = Serving("bfloat16", 1, like.data.seq_len)
  space = _space(history.configs)
  _, answer = ask(Question(space, serving, memory_gb, active_params, tokens=tokens, fit=fitted))
  found, best = answer.found, answer.recommendations[0].best
  used = np.stack([cost / (budget.most * LEAST[budget.field])
                   for budget, cost in zip(found.budgets, found.costs, strict=True)])
  near = np.flatnonzero(found.within() & np.all(used >= 1, axis=0))
  by_routing: dict[tuple[int, int], list[int]] = {}
  for index in near.tolist():
    if index != best:
      by_routing.setdefault(tuple(found.variables[3:, index].tolist()), []).append(index)
  drawn = _draw(by_routing, others, random.Random(seed))
  archs = [_arch(found.architecture(index), like.arch) for index in (best, *drawn)]
  configs = tuple(_config(arch, history.configs, rates) for arch in archs)
  notes = (f"memory {memory_gb:g} GB (bf16, {like.data.seq_len} tokens of cache), active "
           f"{short(active_params)}; {len(near)} architectures of {len(by_routing)} pairs of n_exp "
           f"and n_topk use at least {100 * LEAST['memory_gb']:.0f} % of the memory and "
           f"{100 * LEAST['active_params']:.0f} % of the active parameters",
           *answer.recommendations[0].notes)
  return Contest(configs, fitted.predict(Shape.of(archs), tokens).value, notes)


def _space(configs: Sequence[RunConfig]) -> Space:
  archs = [config.arch for config in configs]

  def span(of, slack: float = 1.0) -> tuple[float, float]:
    values = [of(arch) for arch in archs]
    return min(values) / slack, max(values) * slack

  like = archs[0]
  multiple = math.lcm(_HEAD, 2 * like.n_heads)
  template = like if like.head_dim else dataclasses.replace(
      like, d_model=multiple, n_heads=multiple // _HEAD, n_kv_heads=None, head_dim=_HEAD)
  return Space(template, span(lambda a: a.n_exp), span(lambda a: a.n_topk), multiple,
               span(lambda a: a.d_model / a.n_layers), span(lambda a: a.granularity, 1.03))


def _arch(found: Architecture, like: Architecture) -> Architecture:
  """Gives an architecture the runs' heads: if theirs fill d_model, so do these."""
  if like.head_dim:
    return found
  return dataclasses.replace(found, n_heads=like.n_heads, n_kv_heads=like.n_kv_heads,
                             head_dim=None)


def _draw(by_routing: dict[tuple[int, int], list[int]], n: int,
          rng: random.Random) -> list[int]:
  there = sum(map(len, by_routing.values()))
  require(there >= n, "others", n, f"are not available: only {there} other architectures use "
          "up this budget; choose a larger budget or fewer others")
  drawn: list[int] = []
  while len(drawn) < n:
    routing = rng.choice(sorted(by_routing))
    left = by_routing[routing]
    drawn.append(left.pop(rng.randrange(len(left))))
    if not left:
      del by_routing[routing]
  return drawn


def _config(arch: Architecture, runs: Sequence[RunConfig], rates: Rates | None) -> RunConfig:
  nearest = candidates.nearest(runs, count.n_total(arch), arch.n_exp, arch.sparsity,
                               arch.granularity)
  config = candidates.like_run(nearest, arch, min(run.seed_init for run in runs))
  if rates is None:
    return config
  return dataclasses.replace(
      config, train=dataclasses.replace(config.train, learning_rate=rates.of(arch)))


def rank(grid: Grid, rows: Sequence[Row], seed_sd: float) -> list[str]:
  """Ranks the cells of a contest's grid by loss, and reports the place of the first, the choice.

  Raises:
    FieldError: the choice has no loss, or no other cell has one.
  """
  by_identity = {row.get("identity"): row for row in rows}
  losses, lines = {}, []
  for name, config in zip(grid.names, grid.cells, strict=True):
    row = by_identity.get(identity_hash(config))
    if row is None or UNUSED in row:
      lines.append(f"{name} ({identity_hash(config)}): "
                   + ("not run" if row is None else str(row[UNUSED])))
    else:
      losses[name] = float(row["loss"])
  choice = grid.names[0]
  require(choice in losses, "results", choice, "is the choice but has no loss")
  if len(losses) < 2:
    raise FieldError("results", len(losses), "has only the choice: there is nothing to rank it "
                     "against")
  ordered = sorted(losses, key=losses.get)
  identities = dict(zip(grid.names, map(identity_hash, grid.cells), strict=True))
  lines = [f"{'choice' if name == choice else 'other '}  {name} ({identities[name]}): "
           f"{losses[name]:.4f}, {100 * math.log(losses[name] / losses[choice]):+.2f} %"
           for name in ordered] + lines
  others = [loss for name, loss in losses.items() if name != choice]
  best, middle = min(others), float(np.median(others))
  noise = 1.96 * math.sqrt(2) * seed_sd
  chance = _behind_by_chance(len(others)) * seed_sd
  return [*lines, f"the choice ranks {ordered.index(choice) + 1} of {len(ordered)}",
          f"its loss is {100 * math.log(losses[choice] / best):+.2f} % relative to the best of the "
          f"others and {100 * math.log(losses[choice] / middle):+.2f} % relative to their median; "
          f"two runs of one architecture differ by up to {100 * noise:.2g} % (95 %, seeds "
          f"{100 * seed_sd:.2g} %), and if all were equally good the choice would be up to "
          f"{100 * chance:.2g} % behind the best of the others"]


def _behind_by_chance(others: int) -> float:
  """95 % quantile of one standard normal draw minus the minimum of `others` further draws."""
  from scipy import integrate, optimize, stats

  def exceeded(x: float) -> float:  # P(one - least > x), i.e. the minimum lies below one - x
    return integrate.quad(lambda z: stats.norm.pdf(z) * (1 - stats.norm.sf(z - x)**others),
                          -9, 9)[0]

  return optimize.brentq(lambda x: exceeded(x) - 0.05, -1.0, 9.0)
