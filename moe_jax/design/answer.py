"""What the search says: the best, what is as good, what budgets cost, law against law."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from moe_jax.arch.architecture import Architecture
from moe_jax.design.front import pareto_front
from moe_jax.design.judge import Judge
from moe_jax.design.search import Found

# A difference of 0.01 % of the loss is a tie, which convention breaks, not the law.
TIE = 1e-4
_SAME_COST = 0.01
# "Maximise N_total" is not taken to the letter: a narrower model has a smaller embedding, and so
# a few per cent more room for the rest, at any s.
_AS_LARGE = 0.05
PRINCIPLE = "maximise N_total (to 5 %), then minimise s, then minimise n_exp"


@dataclasses.dataclass(frozen=True, eq=False)
class Recommendation:
  """One law's answer. Indices are of Found.

  Attributes:
    judge: the law.
    best: the architecture with the lowest score; see `_best` for ties.
    score: the lowest score.
    inside: the same of those inside the law's domain; None where there is none.
    near: indices of all within budget that are as good for all the law knows, best first.
    leanest: the one of those with the lowest cost, for each budget.
    prices: budget's field -> change of the best score if it is widened by 10 %.
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
  """All of it.

  Attributes:
    found: the candidates.
    recommendations: one a judge.
    principle: index of the architecture that the paper's principle picks.
    chosen: index of the architecture that was given for comparison; None without one.
  """

  found: Found
  recommendations: tuple[Recommendation, ...]
  principle: int
  chosen: int | None

  def regret(self, index: int, recommendation: int) -> float:
    """By how much the score of candidate `index` is above the best, by one judge."""
    best = self.recommendations[recommendation].score
    return float(self.found.scores[recommendation, index] - best)

  def agrees(self, recommendation: int) -> bool:
    """Whether a law's best is what the principle says: its size, s and n_exp."""
    ours = self.found.architecture(self.recommendations[recommendation].best)
    its = self.found.architecture(self.principle)
    sizes = self.found.shape([self.recommendations[recommendation].best, self.principle]).n_total
    return bool(abs(sizes[0] / sizes[1] - 1) <= _AS_LARGE and ours.n_exp == its.n_exp
                and ours.sparsity == its.sparsity)


def answer(found: Found, judges: Sequence[Judge]) -> Answer:
  """Reads the answer off the candidates; an extra architecture is taken as the chosen one."""
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
  """Of ties the least memory, in steps of 1 %, then the aspect nearest the range's middle."""
  tied = among[scores[among] <= scores[among].min() + TIE]
  memory = np.floor(100 * np.log(found.costs[0, tied]))
  tied = tied[memory == memory.min()]
  return int(tied[np.argmin(_off_middle(found, tied))])


def _off_middle(found: Found, index: np.ndarray) -> np.ndarray:
  n_layers, d_model = found.variables[:2, index]
  return np.abs(np.log(d_model / n_layers) - np.mean(np.log(found.space.aspect)))


def _principle(found: Found, within: np.ndarray) -> int:
  """The largest (within 5 %), of those the least s, of those the least n_exp."""
  n_total = found.within_shapes.n_total
  left = within[n_total >= (1 - _AS_LARGE) * n_total.max()]
  for of in (lambda v: v[3] / v[4], lambda v: v[3]):
    values = of(found.variables[:, left])
    left = left[values == values.min()]
  return int(left[np.argmin(_off_middle(found, left))])


def front(found: Found, row: int) -> np.ndarray:
  """One judge's Pareto front over score, memory and the first inference budget: indices by score.

  Costs less than 1 % apart and losses less than 0.01 % apart count as equal; the lower loss
  stands for the rest. Else a law that sees nothing but the cost would have all on its front.
  """
  within = np.flatnonzero(found.within())
  within = within[np.argsort(found.scores[row, within], kind="stable")]
  coarse = np.floor(np.log(found.costs[:2, within]) / _SAME_COST)
  return within[np.sort(pareto_front(np.floor(found.scores[row, within] / TIE), *coarse))]


def ranges(found: Found, index: np.ndarray) -> dict[str, tuple[float, float]]:
  """Least and largest of each variable among candidates."""
  n_layers, d_model, d_expert, n_exp, n_topk = found.variables[:, index]
  shape = found.shape(index)
  return {name: (float(np.min(x)), float(np.max(x))) for name, x in (
      ("n_layers", n_layers), ("d_model", d_model), ("d_expert", d_expert), ("n_exp", n_exp),
      ("n_topk", n_topk), ("sparsity", n_exp / n_topk), ("granularity", d_model / d_expert),
      ("n_total", shape.n_total), ("n_active", shape.n_active))}


def name(arch: Architecture) -> str:
  """`l8-d512-f128-e64-k8`, as cells are named."""
  return (f"l{arch.n_layers}-d{arch.d_model}-f{arch.d_expert}-e{arch.n_exp}-k{arch.n_topk}")


