import hypothesis
import numpy as np
from hypothesis import strategies as st

from moe_jax.design.front import pareto_front


def brute_force(points):
  """Indices of the undominated; of equals the first."""
  kept = []
  for i, p in enumerate(points):
    dominated = any(all(a <= b for a, b in zip(q, p, strict=True)) and (q != p or j < i)
                    for j, q in enumerate(points) if j != i)
    if not dominated:
      kept.append(i)
  return kept


@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.given(st.integers(0, 2**32 - 1), st.integers(1, 200), st.sampled_from([2, 5, 1000]),
                  st.sampled_from([1, 2]))
def test_it_is_what_nothing_dominates(seed, n, levels, n_costs):
  columns = np.random.default_rng(seed).integers(0, levels, (1 + n_costs, n)).astype(float)
  points = list(map(tuple, columns.T))
  found = pareto_front(*columns)
  assert sorted(found) == brute_force(points)
  assert np.all(np.diff(columns[0, found]) >= 0)


def test_many_points_at_once():
  rng = np.random.default_rng(0)
  columns = rng.random((3, 20_000))
  found = pareto_front(*columns)
  for i in rng.choice(20_000, 200, replace=False):
    better = np.all(columns <= columns[:, [i]], axis=0)
    assert (better.sum() == 1) == (i in found)


def test_one_cheap_point_among_many_of_one_cost_is_on_the_front():
  first, second, score = np.arange(200.0), np.full(200, 5.0), np.zeros(200)
  second[150], score[150] = 1.0, 10.0
  assert pareto_front(score, first, second).tolist() == [0, 150]
