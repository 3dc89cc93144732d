"""The search itself: every architecture of a space, priced and judged in NumPy.

One (n_exp, n_topk) at a time, so that the arrays over (n_layers, d_model, d_expert) stay in
cache. Costs grow with n_exp and with n_topk: a shape that is too dear with few experts is not
looked at with more. Nothing else is skipped: the best found is the best of the lattice.
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from moe_jax.arch.architecture import Architecture
from moe_jax.design.budget import Budget
from moe_jax.design.judge import Judge
from moe_jax.design.space import VARIABLES, Space
from moe_jax.errors import FieldError
from moe_jax.laws.shape import Shape

RELAXED = 1.1  # budgets are also looked at 10 % wider: what they cost is the difference
_ROUNDING = 1 + 1e-9


@dataclasses.dataclass(frozen=True, eq=False)
class Found:
  """Candidates within the relaxed budgets. Arrays [n].

  Attributes:
    space: where they come from.
    budgets: what they were held against.
    variables: n_layers, d_model, d_expert, n_exp, n_topk: int64 [5, n].
    costs: a row a budget, in its unit: [budgets, n].
    scores: a row a judge: [judges, n].
    lattice: how many architectures the space has.
    priced: how many of them were counted and priced; the rest cost more than one that was
      too dear already.
    n_extra: how many at the end were given and need not be on the lattice.
  """

  space: Space
  budgets: tuple[Budget, ...]
  variables: np.ndarray
  costs: np.ndarray
  scores: np.ndarray
  lattice: int
  priced: int
  n_extra: int

  def __len__(self) -> int:
    return self.variables.shape[1]

  def within(self, relaxed: str | None = None) -> np.ndarray:
    """Which meet all budgets, the one named `relaxed` widened by 10 %. Bool [n]."""
    most = np.array([b.most * (RELAXED if b.field == relaxed else 1) for b in self.budgets])
    return np.all(self.costs <= most[:, None] * _ROUNDING, axis=0)

  def shape(self, index) -> Shape:
    """The shapes at an index, a mask or a slice."""
    return self.space.shape(*self.variables[:, index])

  @functools.cached_property
  def within_shapes(self) -> Shape:
    """Those that meet all budgets."""
    return self.shape(self.within())

  def architecture(self, index: int) -> Architecture:
    return self.space.architecture(*(int(x) for x in self.variables[:, index]))


def search(space: Space, budgets: Sequence[Budget], judges: Sequence[Judge],
           extra: Sequence[Architecture] = ()) -> Found:
  """Prices and judges every architecture of the space within the relaxed budgets.

  Args:
    space: the lattice.
    budgets: upper bounds.
    judges: laws that score.
    extra: architectures that are judged too, whatever they cost; of the space's template.

  Raises:
    FieldError: no architecture of the space meets the budgets; the line has the smallest
      that work.
  """
  blocks, priced = [], 0
  routings = space.routings()
  grid = np.stack(space.shapes())
  size = grid.shape[1] * sum(map(len, routings.values()))
  for n_exp, topks in routings.items():
    left = grid
    for n_topk in topks:  # ascending, as n_exp is
      shape = space.shape(*left, n_exp, n_topk)
      priced += left.shape[1]
      cost = _costs(budgets, shape, left.shape[1])
      affordable = np.all(cost <= _most(budgets) * RELAXED * _ROUNDING, axis=0)
      left, cost = left[:, affordable], cost[:, affordable]
      if not left.shape[1]:
        break
      blocks.append(_block(space, left, n_exp, n_topk, cost, judges))
      if n_topk == topks[0]:
        grid = left
    if not grid.shape[1]:
      break
  for arch in extra:
    five = np.array([[getattr(arch, name)] for name in VARIABLES])
    cost = _costs(budgets, space.shape(*five), 1)
    blocks.append(_block(space, five[:3], *five[3:, 0], cost, judges))
  found = (Found(space, tuple(budgets), *(np.concatenate(part, axis=1) for part in
                                          zip(*blocks, strict=True)), size, priced, len(extra))
           if blocks else None)
  if found is None or not found.within()[:len(found) - len(extra)].any():
    raise explain(space, budgets)
  return found


def _most(budgets: Sequence[Budget]) -> np.ndarray:
  return np.array([budget.most for budget in budgets])[:, None]


def _costs(budgets: Sequence[Budget], shape: Shape, n: int) -> np.ndarray:
  return np.stack([np.broadcast_to(budget.of(shape), (n,)) for budget in budgets])


def _block(space: Space, left: np.ndarray, n_exp: int, n_topk: int, cost: np.ndarray,
           judges: Sequence[Judge]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  n = left.shape[1]
  shape = space.shape(*left, n_exp, n_topk)
  experts = np.repeat([[n_exp], [n_topk]], n, axis=1)
  scores = [np.broadcast_to(judge.score(shape), (n,)) for judge in judges]
  return (np.concatenate([left, experts]), cost,
          np.stack(scores) if scores else np.zeros((0, n)))


def explain(space: Space, budgets: Sequence[Budget]) -> FieldError:
  """Why no architecture of the space meets the budgets: the smallest values that work.

  Every cost grows with every variable, so with fewest experts, fewest of them a token.
  """
  n_exp, topks = next(iter(space.routings().items()))
  shapes = space.shapes()
  costs = _costs(budgets, space.shape(*shapes, n_exp, topks[0]), len(shapes[0]))
  most = _most(budgets) * _ROUNDING
  missed = [b for b, cost in enumerate(costs) if cost.min() > most[b, 0]] or [0]
  # One architecture that fits all that is not missed, so that what is named works together.
  fits = np.all(np.delete(costs <= most, missed, axis=0), axis=0)
  least = [budgets[b].flag(float(costs[b, fits].min())) for b in missed]
  line = (f"too small; the smallest that works in this search is {least[0]}" if len(least) == 1
          else f"too small, and not alone; the smallest that work are {' and '.join(least)}")
  return FieldError(budgets[missed[0]].field, budgets[missed[0]].most, line + " (a smaller "
                    "--multiple or --vocab_size, or lower --experts, reaches smaller models)")
