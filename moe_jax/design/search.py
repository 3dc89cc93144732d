"""Exhaustive search: computes costs and scores of every architecture of a space, in NumPy.

Handles one (n_exp, n_topk) at a time, so that the arrays over (n_layers, d_model, d_expert) stay
in cache. Costs grow with n_exp and with n_topk, so a shape that exceeds a budget with few experts
is skipped with more. Nothing else is skipped: the best found is the best of the lattice.
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

RELAXED = 1.1  # also search with budgets 10 % wider; the gain in score is a budget's price
_ROUNDING = 1 + 1e-9


@dataclasses.dataclass(frozen=True, eq=False)
class Found:
  """Candidates within the relaxed budgets. Arrays [n].

  Attributes:
    space: the space they come from.
    budgets: the budgets of the search.
    variables: n_layers, d_model, d_expert, n_exp, n_topk: int64 [5, n].
    costs: one row per budget, in its unit: [budgets, n].
    scores: one row per judge: [judges, n].
    lattice: number of architectures in the space.
    priced: number of those whose costs were computed; the rest must cost more than one that was
      already over budget.
    n_extra: number of extra architectures at the end, which need not be on the lattice or within
      budget.
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
    """Returns which meet all budgets, with the one named `relaxed` widened by 10 %: bool [n]."""
    most = np.array([b.most * (RELAXED if b.field == relaxed else 1) for b in self.budgets])
    return np.all(self.costs <= most[:, None] * _ROUNDING, axis=0)

  def shape(self, index) -> Shape:
    """Returns the shapes at an index, a mask or a slice."""
    return self.space.shape(*self.variables[:, index])

  @functools.cached_property
  def within_shapes(self) -> Shape:
    """The shapes that meet all budgets."""
    return self.shape(self.within())

  def architecture(self, index: int) -> Architecture:
    return self.space.architecture(*(int(x) for x in self.variables[:, index]))


def search(space: Space, budgets: Sequence[Budget], judges: Sequence[Judge],
           extra: Sequence[Architecture] = ()) -> Found:
  """Computes costs and scores of every architecture of the space within the relaxed budgets.

  Args:
    space: the lattice.
    budgets: upper bounds.
    judges: the laws that score.
    extra: further architectures to score at any cost; they must fit the space's template.

  Raises:
    FieldError: no architecture of the space meets the budgets; the message has the smallest
      budgets that work.
  """
  blocks, priced = [], 0
  routings = space.routings()
  grid = np.stack(space.shapes())
  size = grid.shape[1] * sum(map(len, routings.values()))
  for n_exp, topks in routings.items():
    left = grid
    for n_topk in topks:  # ascending, like n_exp
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
  """Returns the error for budgets no architecture meets, with the smallest values that work.

  Costs grow with n_exp and n_topk, so only the smallest n_exp and n_topk need to be checked.
  """
  n_exp, topks = next(iter(space.routings().items()))
  shapes = space.shapes()
  costs = _costs(budgets, space.shape(*shapes, n_exp, topks[0]), len(shapes[0]))
  most = _most(budgets) * _ROUNDING
  missed = [b for b, cost in enumerate(costs) if cost.min() > most[b, 0]] or [0]
  # Only consider architectures that meet the other budgets, which the suggestion must not break.
  fits = np.all(np.delete(costs <= most, missed, axis=0), axis=0)
  least = [budgets[b].flag(float(costs[b, fits].min())) for b in missed]
  line = (f"too small; the smallest that works in this search is {least[0]}" if len(least) == 1
          else "too small, as are other budgets; the smallest that work in this search are "
          + " and ".join(least))
  return FieldError(budgets[missed[0]].field, budgets[missed[0]].most, line + " (a smaller "
                    "--multiple or --vocab_size, or lower --experts, allows smaller models)")
