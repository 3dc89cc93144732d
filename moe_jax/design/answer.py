"""Reads the answer off the search results: the best, near ties, budget prices, law against law."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from moe_jax.arch.architecture import Architecture
from moe_jax.design.front import pareto_front
from moe_jax.design.judge import Judge
from moe_jax.design.search import Found

# Losses within 0.01 % are tied; a convention breaks the tie, not the law.
TIE = 1e-4
_SAME_COST = 0.01
# "Maximize N_total" is not taken literally: at any s, a narrower model has a smaller embedding and
# so a few percent more room for everything else.
_AS_LARGE = 0.05
PRINCIPLE = "maximize N_total (to 5 %), then minimize s, then minimize n_exp"


@dataclasses.dataclass(frozen=True, eq=False)
class Recommendation:
  """One law's answer. Indices refer to candidates of Found.

  Attributes:
    judge: the law.
    best: the architecture with the lowest score; see `_best` for ties.
    score: the lowest score.
    inside: like `best`, among those inside the law's domain; None if there are none.
    near: all within budget that the law cannot distinguish from the best, best first.
    leanest: for each budget, the architecture in `near` with the lowest cost.
    prices: budget's field -> change of the best score if that budget is widened by 10 %.
    notes: lines on how `best` lies outside what the law was fitted on.
    edges: ends of the searched ranges that `best` lies at.
  """

  judge: Judge
  best: int
  score: float
  inside: int | None
  near: np.ndarray
  leanest: tuple[int, ...]
  prices: dict[str, float]
  notes: tuple[str, ...]
  edges: tuple[str, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Answer:
  """The complete answer.

  Attributes:
    found: the candidates.
    recommendations: one per judge.
    principle: index of the architecture that the paper's principle picks.
    chosen: index of the architecture given for comparison; None if none was given.
  """

  found: Found
  recommendations: tuple[Recommendation, ...]
  principle: int
  chosen: int | None

  def regret(self, index: int, recommendation: int) -> float:
    """Score of candidate `index` minus the best score, by one judge."""
    best = self.recommendations[recommendation].score
    return float(self.found.scores[recommendation, index] - best)

  def agrees(self, recommendation: int) -> bool:
    """Whether a law's best has the size (to 5 %), s and n_exp that the principle picks."""
    ours = self.found.architecture(self.recommendations[recommendation].best)
    its = self.found.architecture(self.principle)
    sizes = self.found.shape([self.recommendations[recommendation].best, self.principle]).n_total
    return bool(abs(sizes[0] / sizes[1] - 1) <= _AS_LARGE and ours.n_exp == its.n_exp
                and ours.sparsity == its.sparsity)


def answer(found: Found, judges: Sequence[Judge]) -> Answer:
  """Reads the answer off the candidates; the last extra architecture becomes `chosen`."""
  within = np.flatnonzero(found.within())
  relaxed = {budget.field: found.within(budget.field) for budget in found.budgets}
  recommendations = tuple(_recommend(found, judge, row, within, relaxed)
                          for row, judge in enumerate(judges))
  chosen = len(found) - 1 if found.n_extra else None
  return Answer(found, recommendations, _principle(found, within), chosen)


def _recommend(found: Found, judge: Judge, row: int, within: np.ndarray,
               relaxed: dict[str, np.ndarray]) -> Recommendation:
  scores = found.scores[row]
  least = float(scores[within].min())
  best = _best(found, scores, within)
  inside = within[judge.inside(found.within_shapes)]
  slack = judge.slack(found.within_shapes, found.shape(best))
  near = within[scores[within] - least <= np.maximum(slack, TIE)]
  near = near[np.argsort(scores[near], kind="stable")]
  prices = {field: float(scores[mask].min()) - least for field, mask in relaxed.items()}
  arch = found.architecture(best)
  return Recommendation(
      judge, best, least, _best(found, scores, inside) if len(inside) else None, near,
      tuple(int(near[np.argmin(cost[near])]) for cost in found.costs), prices,
      judge.notes(found.shape(best)), found.space.edges(arch))


def _best(found: Found, scores: np.ndarray, among: np.ndarray) -> int:
  """Breaks ties by the least memory, in steps of 1 %, then by the aspect nearest mid-range."""
  tied = among[scores[among] <= scores[among].min() + TIE]
  memory = np.floor(100 * np.log(found.costs[0, tied]))
  tied = tied[memory == memory.min()]
  return int(tied[np.argmin(_off_middle(found, tied))])


def _off_middle(found: Found, index: np.ndarray) -> np.ndarray:
  n_layers, d_model = found.variables[:2, index]
  return np.abs(np.log(d_model / n_layers) - np.mean(np.log(found.space.aspect)))


def _principle(found: Found, within: np.ndarray) -> int:
  """Of the largest (within 5 %), picks those of least s, and of those the one of least n_exp."""
  n_total = found.within_shapes.n_total
  left = within[n_total >= (1 - _AS_LARGE) * n_total.max()]
  for of in (lambda v: v[3] / v[4], lambda v: v[3]):
    values = of(found.variables[:, left])
    left = left[values == values.min()]
  return int(left[np.argmin(_off_middle(found, left))])


def front(found: Found, row: int) -> np.ndarray:
  """One judge's Pareto front over score, memory and the first inference budget: indices by score.

  Costs are compared in bins of 1 % and losses in bins of 0.01 %, and the lowest loss represents
  equal ones. Otherwise a law that depends only on the cost would have everything on its front.
  """
  within = np.flatnonzero(found.within())
  within = within[np.argsort(found.scores[row, within], kind="stable")]
  coarse = np.floor(np.log(found.costs[:2, within]) / _SAME_COST)
  return within[np.sort(pareto_front(np.floor(found.scores[row, within] / TIE), *coarse))]


def ranges(found: Found, index: np.ndarray) -> dict[str, tuple[float, float]]:
  """Returns the minimum and maximum of each variable among candidates."""
  n_layers, d_model, d_expert, n_exp, n_topk = found.variables[:, index]
  shape = found.shape(index)
  return {name: (float(np.min(x)), float(np.max(x))) for name, x in (
      ("n_layers", n_layers), ("d_model", d_model), ("d_expert", d_expert), ("n_exp", n_exp),
      ("n_topk", n_topk), ("sparsity", n_exp / n_topk), ("granularity", d_model / d_expert),
      ("n_total", shape.n_total), ("n_active", shape.n_active))}


def name(arch: Architecture) -> str:
  """Names an architecture as cells are named: `l8-d512-f128-e64-k8`."""
  return (f"l{arch.n_layers}-d{arch.d_model}-f{arch.d_expert}-e{arch.n_exp}-k{arch.n_topk}")


