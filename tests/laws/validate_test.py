"""Leaving out, holding out and rival forms, on grids whose law is known."""

import dataclasses

import numpy as np
import pytest

from moe_jax.errors import FieldError
from moe_jax.laws import validate
from moe_jax.laws.cells import Cells
from moe_jax.laws.fit import fit
from moe_jax.laws.reduce import to_cells
from moe_jax.laws.report import extrapolation_line
from tests.laws.fit_test import PLANTED, grid_of_runs
from tests.laws.results_file import rows_of


@pytest.fixture(scope="module")
def cells():
  return to_cells(rows_of(n_cells=30))


def test_leaving_an_architecture_out_leaves_all_its_cells_out():
  fitted = fit(to_cells(rows_of(n_cells=12, tokens=(1e9, 4e9))), "paper")
  parts = validate.leave_one_architecture_out(fitted)
  assert len(parts) == 12 and all(len(part.error) == 2 for part in parts)


def test_the_refit_is_that_of_the_rest(cells):
  fitted = fit(cells, "paper")
  part = validate.leave_one_architecture_out(fitted)[0]
  rest = fit(cells.take(np.array(cells.names) != part.what), "paper")
  np.testing.assert_allclose(part.theta, rest.least_squares.theta, rtol=1e-9)


def test_an_outlier_is_named(cells):
  cells = cells.take(np.arange(len(cells)))
  cells.loss[7] *= 1.05
  parts = validate.leave_one_architecture_out(fit(cells, "paper"))
  worst = max(parts, key=lambda part: abs(part.error[0]))
  assert worst.what == cells.names[7]


def test_each_value_of_n_exp_is_left_out_in_turn(cells):
  parts = validate.leave_one_value_out(fit(cells, "paper"), "n_exp")
  assert [part.what for part in parts] == [f"n_exp {e}" for e in (8, 16, 32, 64, 128)]


def test_extrapolation_holds_out_the_largest_or_says_why_not(cells):
  fitted = fit(cells, "paper")
  assert len(validate.extrapolate(fitted, "sparsity").error) == np.sum(
      cells.columns["sparsity"] == cells.columns["sparsity"].max())
  two = cells.take((cells.columns["n_exp"] == 8) | (cells.columns["n_exp"] == 16))
  part = validate.extrapolate(fit(two, "paper"), "n_exp")
  assert part.error is None and extrapolation_line(part, fitted).startswith(
      "no extrapolation: without n_exp 16 the form cannot be fitted: ")


def test_sizes_that_hardly_differ_are_extrapolated_from_by_nothing(cells):
  """Two sizes of N_total, met to a per cent: without the larger the slope is one of noise."""
  sizes = np.resize([2.0e6, 2.01e6, 2.02e6, 6.0e6, 6.05e6], len(cells))
  near = dataclasses.replace(cells, columns=cells.columns | {"n_total": sizes})
  part = validate.extrapolate(fit(near, "paper"), "n_total")
  assert part.error is None and "do not identify a: ln n_total hardly varies" in part.refusal


def test_one_of_another_size_is_not_left_out_at_face_value(cells):
  """Sizes met to a per cent and one other: all that is known of a hangs on that one."""
  parts = validate.leave_one_architecture_out(fit(one_of_another_size(cells), "paper"))
  (part,) = [part for part in parts if part.theta is None]
  assert part.what == cells.names[0] and part.error is None
  assert "do not identify a: ln n_total hardly varies" in part.refusal


def one_of_another_size(cells):
  sizes = np.resize([2.0e6, 2.01e6, 2.02e6], len(cells))
  sizes[0] = 6e6
  return dataclasses.replace(cells, columns=cells.columns | {"n_total": sizes})


def test_a_bend_shows_in_extrapolation():
  n = np.exp(np.linspace(17, 22, 30))
  n_exp = np.tile([8.0, 16, 32], 10)
  n_topk = np.tile([1.0, 2, 1, 4, 1, 2, 2, 4, 8, 1], 3)
  log_loss = 3 - 0.1 * np.log(n) + 0.02 * (np.log(n) - 20)**2
  fitted = fit(Cells.of(np.exp(log_loss), n_total=n, n_exp=n_exp, n_topk=n_topk), "paper")
  part = validate.extrapolate(fitted, "n_total")
  assert np.mean(part.error) > 2 * np.std(fitted.residual)


def test_the_true_form_wins_among_rivals():
  cells = grid_of_runs(noise=0.002)("paper", PLANTED["paper"])
  rivals = {r.law: r for r in validate.compare(
      cells, ["paper", "total-sparsity", "total-active"])}
  for other in ("total-sparsity", "total-active"):
    assert rivals["paper"].cv_rmse < rivals[other].cv_rmse
    assert rivals["paper"].aicc < rivals[other].aicc
    assert rivals["paper"].bic < rivals[other].bic
    mean, error = validate.cv_difference(rivals["paper"], rivals[other])
    assert mean < -2 * error < 0
    assert mean == pytest.approx(rivals["paper"].cv_rmse**2 - rivals[other].cv_rmse**2)


def test_the_f_test_holds_its_level_and_has_power():
  law = dict(zip(("c0", "a", "b_minus_c", "c", "d"), PLANTED["paper"], strict=True))
  p_values = []
  for seed in range(200):
    cells = grid_of_runs(seed, 24, 0.003)("paper", list((law | {"b_minus_c": 0}).values()))
    p_values.append(
        validate.f_test(fit(cells, "total-sparsity"), fit(cells, "paper")).p_value)
  assert 0.01 < np.mean(np.array(p_values) < 0.05) < 0.10
  cells = grid_of_runs(0, 24, 0.001)("paper", PLANTED["paper"])
  assert validate.f_test(fit(cells, "total-sparsity"), fit(cells, "paper")).p_value < 1e-4


def test_a_form_against_itself(cells):
  fitted = fit(cells, "paper")
  with pytest.raises(FieldError, match="no further parameter"):
    validate.f_test(fitted, fitted)


def test_a_rival_that_cannot_be_fitted_says_why():
  cells = Cells.of([3.0, 2.5, 2.2, 2.0, 1.9], n_total=10.0**np.arange(5, 10))
  (rival,) = validate.compare(cells, ["total-active"])
  assert "n_active" in rival.refusal
