"""Intervals have the width that theory gives them where theory knows it."""

import dataclasses
import re

import numpy as np
import pytest
import scipy.optimize
from scipy import stats

from benchmarks.law_coverage import LAWS, SCENARIOS, coverage
from moe_jax.laws import intervals
from moe_jax.laws.cells import Cells
from moe_jax.laws.fit import fit, fit_identified
from moe_jax.laws.forms import form_for
from moe_jax.laws.identify import identify
from moe_jax.laws.reduce import to_cells
from tests.laws.fit_test import PLANTED, grid_of_runs
from tests.laws.results_file import rows_of


def curved():
  """The law of dense models, fitted to planted data that bound each of its parameters."""
  return fit(grid_of_runs(noise=0.003)("chinchilla", PLANTED["chinchilla"]), "chinchilla",
             n_starts=8)


def t_width(fitted, p):
  """Width of Student's 95 % interval of an ordinary regression's coefficient."""
  x_NP = fitted.form.matrix(fitted.cells)[0]
  n, k = x_NP.shape
  variance = np.sum(fitted.residual**2) / (n - k) * np.linalg.inv(x_NP.T @ x_NP)[p, p]
  return 2 * stats.t.ppf(0.975, n - k) * np.sqrt(variance)


def width(interval):
  return interval.high - interval.low


def test_the_profile_of_a_log_log_form_is_students_interval(fitted):
  for p, name in enumerate(fitted.parameters):
    interval = intervals.profile(fitted)[name]
    assert width(interval) == pytest.approx(t_width(fitted, p))
    assert interval.covers(interval.estimate)


def test_the_bootstrap_t_is_near_it(fitted):
  found = intervals.bootstrap(fitted, draws=4000)
  for p, name in enumerate(fitted.parameters):
    assert width(found[name]) == pytest.approx(t_width(fitted, p), rel=0.1)


def test_the_order_of_the_cells_decides_nothing():
  cells = to_cells(rows_of(n_cells=20, learning_rates=1))
  shuffled = cells.take(np.random.default_rng(0).permutation(len(cells)))
  found, again = (intervals.bootstrap(fit(some, "paper"), draws=199) for some in (cells, shuffled))
  for name, one in found.items():
    assert [again[name].low, again[name].high] == pytest.approx([one.low, one.high], rel=1e-9)


def test_errors_that_all_sizes_of_a_pair_share_widen_its_interval():
  rng, form = np.random.default_rng(1), None
  n_exp, sparsity, n_total = (values.ravel() for values in np.meshgrid(
      [8.0, 16, 32, 64, 128], [2.0, 4, 8], [2e6, 6e6, 16e6], indexing="ij"))
  shared = 0.003 * np.repeat(rng.standard_normal(15), 3)
  loss = 5 * n_total**-0.1 * np.exp(shared + 0.0003 * rng.standard_normal(45))
  cells = Cells.of(loss, n_total=n_total, n_exp=n_exp, sparsity=sparsity)
  form = fit(cells, "paper")
  by_cell, by_pair = intervals.bootstrap(form), intervals.by_pair(form)
  assert width(by_pair["b_minus_c"]) > 1.3 * width(by_cell["b_minus_c"])
  assert width(by_pair["a"]) < width(by_cell["a"])  # what a pair shares does not blur it
  assert intervals.by_pair(fit(cells.take(n_total < 3e6), "paper")) == {}
  assert intervals.by_pair(fit(grid_of_runs(noise=0.01)("chinchilla", PLANTED["chinchilla"]),
                               "chinchilla")) == {}


def test_subsamples_are_rescaled(fitted):
  """Without the factor sqrt(m / (G - m)) = 2 they would be half as wide."""
  found = intervals.subsample(fitted, draws=500)
  for p, name in enumerate(fitted.parameters):
    assert 0.75 < width(found[name]) / t_width(fitted, p) < 1.5


def test_errors_shared_by_an_architecture_widen_the_interval():
  """Three copies of each point are no more data than one."""
  one = to_cells(rows_of(n_cells=40, learning_rates=1))
  copied = fit(one.take(np.repeat(np.arange(len(one)), 3)), "paper")
  honest, fooled, alone = (
      sum(width(found[name]) for name in ("a", "b_minus_c", "c")) for found in (
          intervals.bootstrap(copied), intervals.profile(copied),
          intervals.profile(fit(one, "paper"))))
  assert honest == pytest.approx(alone, rel=0.3)
  assert fooled < 0.65 * alone


def test_a_profile_of_a_curved_form_ends_where_the_fit_gets_worse_by_the_quantile():
  fitted = curved()
  problem = fitted.problem
  n, k = len(fitted.cells), len(fitted.parameters)
  rss = np.sum(fitted.residual**2)
  for p, (name, interval) in enumerate(intervals.profile(fitted).items()):
    assert interval.low < fitted.value(name) < interval.high
    for end in (interval.low, interval.high):
      # The others are refitted with the parameter held there, by another method.
      at, free = fitted.least_squares.theta.copy(), np.arange(k) != p
      at[p] = end

      def residual(others, at=at, free=free):
        at[free] = others
        return problem.residual(problem.to_phi @ at)

      refitted = scipy.optimize.least_squares(residual, at[free], x_scale="jac", xtol=1e-12,
                                              ftol=1e-14, gtol=1e-14)
      worse = 2 * refitted.cost / rss - 1
      assert worse == pytest.approx(stats.t.ppf(0.975, n - k)**2 / (n - k), rel=1e-2), name


@pytest.mark.parametrize("left", [-1e-40, 0.0, 1e-40])
def test_a_parameter_that_the_data_say_nothing_of_has_no_ends(monkeypatch, left):
  """What rounding leaves of its variance may be below zero or nothing."""
  fitted = curved()
  gone = dataclasses.replace(fitted.least_squares, theta=np.append(
      fitted.least_squares.theta[:-1], -95.0))  # ln_E: a floor of e^-95
  inverse = np.linalg.pinv

  def pinv(of):
    found = inverse(of)
    found[-1, -1] = left
    return found

  monkeypatch.setattr(np.linalg, "pinv", pinv)
  found = intervals.profile(dataclasses.replace(fitted, least_squares=gone))["ln_E"]
  assert (found.low, found.high) == (-np.inf, np.inf)


def test_what_the_data_do_not_bound_has_an_infinite_end():
  """Over a narrow range of tokens an irreducible loss cannot be told from none."""
  rng = np.random.default_rng(0)
  n = 30
  n_active, tokens = np.exp(rng.uniform(17, 19, n)), np.exp(rng.uniform(20, 20.3, n))
  log_loss = 2 - 0.1 * np.log(n_active) + 0.01 * rng.standard_normal(n)
  cells = Cells.of(np.exp(log_loss), n_active=n_active, tokens=tokens)
  # With all its terms: `fit` leaves out those that the best fit puts at 0.
  found = intervals.profile(fit_identified(identify(form_for("chinchilla", cells), cells), cells,
                                           n_starts=8))
  assert not np.isfinite([found["ln_E"].low, found["ln_B"].low, found["beta"].high]).all()


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["swept", "several tokens"])
def test_intervals_cover_the_truth_as_often_as_they_say(monkeypatch, scenario):
  """Over 1,000 planted grids 95 % intervals hold each coefficient 93 to 97 % of the time."""
  monkeypatch.setattr(intervals, "profile", lambda fitted: {})  # of which nothing is asked here
  found = coverage("paper", 1000, huber_every=10**6, **SCENARIOS[scenario])
  quoted = {name: hits / n for (method, name), (hits, n) in found.items()
            if "bootstrap-t" in method and n >= 950}
  assert {"c0", "a", "b_minus_c", "c"} <= set(quoted)
  assert all(0.93 <= share <= 0.97 for share in quoted.values()), quoted


@pytest.mark.slow
@pytest.mark.parametrize("law,scenario,grids", [
    ("paper", "swept, two seeds", 200), ("paper", "one learning rate", 200),
    ("paper", "several tokens, one learning rate", 200), ("paper-curved", "swept", 200),
    ("experts-or-core", "swept", 200), ("paper-tokens", "several tokens", 60)])
def test_the_intervals_of_other_forms_and_grids_cover_too(monkeypatch, law, scenario, grids):
  """The limits are three standard errors of what so few grids can tell."""
  monkeypatch.setattr(intervals, "profile", lambda fitted: {})  # of which nothing is asked here
  draws = 100 if law == "paper-tokens" else 399  # a curved form's are refits
  found = coverage(law, grids, draws=draws, huber_every=10**6, granularities=LAWS[law][1],
                   **SCENARIOS[scenario])
  quoted = {name: (hits / n, n) for (method, name), (hits, n) in found.items()
            if "bootstrap-t" in method or "least squares" in method}
  assert {"b_minus_c", "c"} <= set(quoted) or {"more_experts", "core"} <= set(quoted)
  for name, (share, n) in quoted.items():
    noise = 3 * np.sqrt(0.95 * 0.05 / n)
    assert n >= 0.9 * grids and abs(share - 0.95) <= noise + 0.005, (name, share, n)


@pytest.mark.parametrize("others,bounded", [(1, False), (2, True)])
@pytest.mark.parametrize("solver", ["least squares", "huber"])
def test_subsamples_that_do_not_identify_the_form_are_counted(others, bounded, solver):
  """One size and a few of another: subsamples of the one alone say nothing of a."""
  rng, n = np.random.default_rng(0), 20
  sizes = np.where(np.arange(n) < others, 6e6, 2e6)
  n_exp = 2.0**rng.integers(3, 8, n)
  fitted = fit(Cells.of(np.exp(3 - 0.09 * np.log(sizes) + 0.002 * rng.standard_normal(n)),
                        n_total=sizes, n_exp=n_exp, n_topk=2.0**rng.integers(0, 3, n)), "paper")
  found = intervals.subsample(fitted, draws=200, solver=solver)["a"]
  assert re.search(r", \d+ of 200 of which do not identify the form", found.method)
  assert np.isfinite([found.low, found.high]).all() == bounded
