"""The runs chosen are the ones that shrink the interval, counted anew for each."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.errors import FieldError
from moe_jax.laws import exchange, intervals
from moe_jax.laws.exchange import Pool, Target, choose, half_width, with_runs
from moe_jax.laws.fit import fit
from moe_jax.laws.forms import form_for
from moe_jax.laws.information import Design, Noise, degrees_of_freedom, design_of
from moe_jax.laws.power import t_quantile
from moe_jax.laws.reduce import to_cells
from tests.laws.results_file import rows_of

NAMES = ("c0", "a", "b_minus_c", "c")


def pool_of(rng, n_run=8, n_more=8, cost=False, architectures=None):
  """Cells with random variables, the first `n_run` of which have been run."""
  n = n_run + n_more
  x_NP = np.concatenate([np.ones((n, 1)), rng.normal(size=(n, 3))], axis=1)
  seeds_N = np.where(np.arange(n) < n_run, rng.integers(1, 4, n), 0).astype(float)
  of = np.arange(n) if architectures is None else rng.integers(0, architectures, n)
  return Pool(Design(NAMES, x_NP, of, seeds_N),
              rng.uniform(1, 5, n) if cost else np.ones(n))


def target(name="b_minus_c"):
  if name == "all":
    return Target("all", np.eye(4)[1:], volume=True)
  return Target(name, np.eye(4)[[NAMES.index(name)]] if name in NAMES else np.eye(4)[1:])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 0.01), st.sampled_from([None, 5]),
       st.sampled_from(["b_minus_c", "all", "mean"]))
def test_the_scores_of_all_candidates_are_those_of_each(seed, spread, shared, name):
  """The outer products against the covariance of the grid that has the run."""
  rng = np.random.default_rng(seed)
  pool, noise, to_know = pool_of(rng, architectures=shared), Noise(0.002, spread), target(name)
  added = rng.integers(0, 16, 2).tolist()
  score_N = exchange._scores(pool, noise, to_know, added)
  for j in range(16):
    design = with_runs(pool, [*added, j])
    df = degrees_of_freedom(*design.x_NP.shape, len(np.unique(design.architecture_N)))
    variance = np.exp(to_know.log_variance(design.covariance(noise)[None])[0])
    assert np.exp(score_N[j] / 2) == pytest.approx(np.sqrt(variance) * t_quantile(df), rel=1e-4)


@pytest.mark.parametrize("name", ["b_minus_c", "all", "mean"])
def test_it_is_nearly_as_good_as_trying_everything(name):
  ratios = []
  for seed in range(12):
    pool = pool_of(np.random.default_rng(seed), n_more=6)
    noise, to_know = Noise(0.002, 0.002), target(name)
    found = choose(pool, noise, to_know, 3)
    best = min(half_width(pool, noise, to_know, list(runs)) for runs in
               itertools.combinations_with_replacement(range(14), 3))
    assert found.half_width[-1] == pytest.approx(
        half_width(pool, noise, to_know, list(found.added)))
    ratios.append(found.half_width[-1] / best)
  assert max(ratios) < 1.05 and np.mean(ratios) < 1.01


def test_each_run_helps_and_the_first_helps_most_alone():
  pool = pool_of(np.random.default_rng(0))
  found = choose(pool, Noise(0.002, 0.001), target(), 4)
  assert len(found.added) == 4
  assert np.all(np.diff(found.half_width) < 0)
  assert found.alone[0] == found.half_width[1] == min(found.alone)


def test_repeats_are_chosen_where_seeds_are_the_noise_alone():
  """A cell at the end of the range, again and again; with noise of architectures, new ones."""
  x = np.array([-1, -0.2, 0, 0.2, 1, 0.9, 0.95])
  design = Design(("c0", "c"), np.stack([np.ones(7), x], axis=1), np.arange(7),
                  np.array([1.0, 1, 1, 1, 1, 0, 0]))
  pool, slope = Pool(design, np.ones(7)), Target("c", np.eye(2)[[1]])
  many = Pool(Design(design.parameters, np.tile(design.x_NP, (9, 1)), np.arange(63),
                     np.concatenate([np.ones(56), design.seeds_N[-7:]])), np.ones(63))
  assert set(choose(many, Noise(1e-9, 0.01), slope, 2).added) <= {61, 62}
  only_seeds = choose(pool, Noise(0.01, 0), slope, 4).added
  assert {0} < set(only_seeds)


def test_what_will_be_reported_is_what_the_fit_reports():
  """Repeats make single cells no better known, but the fit pools what both scatter by."""
  rng, noise = np.random.default_rng(5), Noise(0.002, 0.0005)
  cells = to_cells(rows_of(n_cells=14, learning_rates=1))
  seeds = np.where(np.arange(14) < 5, 4.0, 1.0)
  design = design_of(form_for("paper", cells), dataclasses.replace(cells, seeds=seeds))
  pool = Pool(design, np.ones(14))
  to_know = Target("b_minus_c", np.eye(4)[[design.parameters.index("b_minus_c")]])
  widths = []
  for _ in range(60):
    errors = (noise.architecture * rng.standard_normal(14)
              + noise.seed / np.sqrt(seeds) * rng.standard_normal(14))
    found = intervals.bootstrap(fit(dataclasses.replace(cells, loss=3 * np.exp(errors)), "paper"),
                                draws=199)["b_minus_c"]
    widths.append((found.high - found.low)**2)
  reported = exchange.reported_half_width(pool, noise, to_know, [])
  assert reported == pytest.approx(np.sqrt(np.mean(widths)) / 2, rel=0.12)
  assert reported > 1.03 * half_width(pool, noise, to_know, [])
  alike = Pool(dataclasses.replace(design, seeds_N=np.full(14, 2.0)), pool.cost_N)
  assert exchange.reported_half_width(alike, noise, to_know, []) == pytest.approx(
      half_width(alike, noise, to_know, []))


def test_a_budget_is_kept_and_cheap_runs_are_preferred():
  pool = pool_of(np.random.default_rng(3), cost=True)
  noise, to_know = Noise(0.002, 0.002), target()
  for budget in (4.0, 9.0):
    found = choose(pool, noise, to_know, 10, budget)
    assert 0 < pool.cost_N[list(found.added)].sum() <= budget
  free = choose(pool, noise, to_know, 10)
  assert free.half_width[-1] < found.half_width[-1]


def test_what_is_not_identified_yet_is_identified_first():
  """Of eight candidates one alone breaks a tie."""
  rng = np.random.default_rng(0)
  pool = pool_of(rng)
  pool.design.x_NP[:, 2] = 0.5 * pool.design.x_NP[:, 1]
  pool.design.x_NP[11, 2] += 1
  found = choose(pool, Noise(0.002, 0.002), target(), 2)
  assert found.added[0] == 11
  assert np.isinf(found.half_width[0]) and np.isfinite(found.half_width[1])


def test_bad_input():
  pool = pool_of(np.random.default_rng(0), cost=True)
  with pytest.raises(FieldError, match="flops=0.5: is too small for any run: the cheapest takes"):
    choose(pool, Noise(0.002, 0), target(), 1, budget=0.5)
