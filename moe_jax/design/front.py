"""Computes the Pareto front: candidates that no other candidate dominates."""

import bisect

import numpy as np

_BINS = 64


def pareto_front(score_N: np.ndarray, *cost_N: np.ndarray) -> np.ndarray:
  """Returns the indices that no other candidate dominates, by ascending score.

  One candidate dominates another if it is at least as good in score and in every cost, and better
  in one of them. Of exact duplicates the first is kept.

  Args:
    score_N: scores; lower is better.
    *cost_N: one or two costs; lower is better.
  """
  first_N, second_N = cost_N if len(cost_N) == 2 else (cost_N[0], np.zeros_like(score_N))
  index = np.flatnonzero(_maybe(score_N, first_N, second_N))
  order = index[np.lexsort((second_N[index], first_N[index], score_N[index]))]
  kept = []
  # Staircase of the costs kept so far: first cost ascending, second descending.
  firsts: list[float] = []
  seconds: list[float] = []
  for i in order:
    first, second = float(first_N[i]), float(second_N[i])
    at = bisect.bisect_right(firsts, first)
    if at and seconds[at - 1] <= second:
      continue
    kept.append(i)
    start = bisect.bisect_left(firsts, first)
    end = start
    while end < len(firsts) and seconds[end] >= second:
      end += 1
    firsts[start:end], seconds[start:end] = [first], [second]
  return np.array(kept, np.int64)


def _maybe(score_N: np.ndarray, first_N: np.ndarray, second_N: np.ndarray) -> np.ndarray:
  """Prefilter: False if a candidate in lower bins of the costs has a score at least as good."""
  def binned(x_N):
    edges = np.unique(np.quantile(x_N, np.linspace(0, 1, _BINS + 1)[1:-1]))
    return np.searchsorted(edges, x_N, side="left")

  i_N, j_N = binned(first_N), binned(second_N)
  best_IJ = np.full((_BINS + 1, _BINS + 1), np.inf)
  # Shift bins by one so that only strictly lower bins count, except for a cost that all
  # candidates share.
  down_i, down_j = (int(x_N.min() < x_N.max()) for x_N in (first_N, second_N))
  np.minimum.at(best_IJ, (i_N + down_i, j_N + down_j), score_N)
  best_IJ = np.minimum.accumulate(np.minimum.accumulate(best_IJ, axis=0), axis=1)
  if not (down_i or down_j):
    return np.ones(len(score_N), bool)
  return score_N < best_IJ[i_N, j_N]
