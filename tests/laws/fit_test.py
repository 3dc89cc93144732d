"""Both solvers recover what was planted; a fit that did not move is an error."""

import dataclasses

import numpy as np
import pytest
import scipy.optimize

from moe_jax.design.judge import jackknife
from moe_jax.errors import FieldError
from moe_jax.laws import solvers
from moe_jax.laws.cells import Cells
from moe_jax.laws.fit import fit
from moe_jax.laws.forms import FORMS, form_for
from moe_jax.laws.reduce import to_cells
from moe_jax.laws.shape import Shape
from moe_jax.laws.solvers import Problem, check_moved, huber_from, huber_sum
from tests.laws.results_file import TRUTH, rows_of


def grid_of_runs(seed=0, n=60, noise=0.0):
  """Cells with every column varied on its own, and a loss to be set by the test."""
  rng = np.random.default_rng(seed)
  n_topk = 2.0**rng.integers(0, 4, n)
  columns = dict(
      n_total=np.exp(rng.uniform(np.log(3e7), np.log(3e9), n)), n_topk=n_topk,
      n_exp=n_topk * 2.0**rng.integers(1, 6, n), tokens=10**rng.uniform(9, 11, n),
      granularity=2.0**rng.integers(0, 5, n))
  columns["n_active"] = columns["n_total"] * rng.uniform(0.05, 0.9, n)
  cells = Cells.of(np.ones(n), **columns)

  def with_law(law, theta):
    form = form_for(law, cells)
    log_loss = form.log_loss(np.array(theta), cells) + noise * rng.standard_normal(n)
    return Cells.of(np.exp(log_loss), **columns)

  return with_law


PLANTED = {
    "paper": [3.5, 0.1, 0.01, 0.02, 0.05],
    "chinchilla": [np.log(482), 0.35, np.log(2085), 0.37, np.log(1.8)],
    "krajewski": [np.log(30), 0.58, 0.25, np.log(100), np.log(900), 0.3, np.log(1.5)],
    "paper-tokens": [np.log(300), 0.3, 0.03, 0.06, np.log(900), 0.3, np.log(1.5)],
    "joint-moe": [np.log(100), -0.2, 0.28, -0.01, np.log(900), 0.2, 0.32, 0.02, np.log(1.4)],
}


@pytest.mark.parametrize("law", PLANTED)
def test_planted_laws_are_recovered_without_noise(law):
  fitted = fit(grid_of_runs()(law, PLANTED[law]), law, n_starts=8)
  for solution in (fitted.least_squares, fitted.huber):
    np.testing.assert_allclose(solution.theta, PLANTED[law], rtol=2e-3, atol=2e-3)
    assert solution.rmse < 1e-5


def test_a_term_that_the_best_fit_puts_at_0_is_left_out():
  """Planted: an irreducible loss below 0, which the form does not have."""
  planted = grid_of_runs()("paper-tokens", [*PLANTED["paper-tokens"][:-1], np.log(1.5)])
  cells = Cells.of(planted.loss - 2, **planted.columns)
  fitted = fit(cells, "paper-tokens", n_starts=8)
  assert fitted.parameters == ("ln_A", "a", "b_minus_c", "c", "ln_B", "beta")
  with pytest.raises(FieldError, match="its term is 0 in the best fit, so the form is"):
    fitted.value("ln_E")
  covariance_PP, _ = jackknife(fitted)  # refits, none of which could be made with that term
  assert np.isfinite(covariance_PP).all() and (np.diag(covariance_PP) > 0).all()
  assert "ln_E" in fit(planted, "paper-tokens", n_starts=8).parameters


def test_the_solvers_agree_within_the_noise():
  fitted = fit(grid_of_runs(noise=0.003)("chinchilla", PLANTED["chinchilla"]), "chinchilla",
               n_starts=8)
  np.testing.assert_allclose(fitted.least_squares.theta, fitted.huber.theta, atol=0.3)
  assert fitted.huber.objective <= fitted.least_squares.objective
  assert fitted.least_squares.rmse <= fitted.huber.rmse


def test_huber_shrugs_at_an_outlier():
  cells = grid_of_runs(noise=0.001)("chinchilla", PLANTED["chinchilla"])
  cells.loss[0] *= 1.3
  fitted = fit(cells, "chinchilla", n_starts=8)
  off = np.abs(np.array([fitted.huber.theta, fitted.least_squares.theta])
               - PLANTED["chinchilla"])[:, [1, 3]].sum(axis=1)
  assert off[0] < 0.25 * off[1]


def test_the_log_log_form_through_the_whole_pipeline():
  fitted = fit(to_cells(rows_of(noise=1e-6)), "paper")
  for name in ("a", "b_minus_c", "c"):
    assert fitted.value(name) == pytest.approx(TRUTH[name], abs=1e-5)


def test_a_fitted_law_answers_like_a_published_one():
  fitted = fit(to_cells(rows_of(noise=1e-6)), "paper")
  shape = Shape(n_layers=8, d_model=512, d_expert=128, n_exp=np.array([32, 64, 512]), n_topk=4)
  answer = fitted.predict(shape, tokens=9e9)
  log_loss = (fitted.value("c0") - 0.09 * np.log(shape.n_total) + 0.01 * np.log(shape.n_exp)
              + 0.02 * np.log(shape.sparsity))
  np.testing.assert_allclose(np.log(answer.loss), log_loss, atol=1e-3)
  assert "n_exp = 512 is above 128, the maximum in the data it was fitted to" in answer.outside


@pytest.mark.parametrize("law", FORMS)
def test_gradients(law):
  cells = Cells.of(**dict(
      loss=np.full(20, 3.0), n_layers=np.arange(2, 22), d_model=64 * np.arange(1, 21),
      **{name: values[:20] for name, values in grid_of_runs()(
          "paper", PLANTED["paper"]).columns.items()}))
  form = form_for(law, cells)
  problem = Problem(form, form.matrix(cells), cells.log_loss)
  phi = problem.starts(1, np.random.default_rng(0))[0]
  assert scipy.optimize.check_grad(
      lambda at: huber_sum(problem.residual(at), 0.1),
      lambda at: problem.jacobian(at).T @ np.clip(problem.residual(at), -0.1, 0.1), phi) < 1e-5
  np.testing.assert_allclose(problem.to_phi @ problem.to_theta, np.eye(len(phi)), atol=1e-9)


def test_huber_regression_is_the_minimum():
  cells = grid_of_runs(noise=0.01)("paper", PLANTED["paper"])
  form = form_for("paper", cells)
  problem = Problem(form, form.matrix(cells), cells.log_loss)
  phi, value = huber_from(problem, np.zeros(5))
  rng = np.random.default_rng(1)
  for _ in range(50):
    assert huber_sum(problem.residual(phi + 1e-4 * rng.standard_normal(5))) >= value


def test_huber_sum_is_quadratic_inside_and_linear_outside():
  assert huber_sum(np.array([0.5e-3]), 1e-3) == pytest.approx(0.125e-6)
  assert huber_sum(np.array([3e-3, -3e-3]), 1e-3) == pytest.approx(2 * 2.5e-6)


def test_a_parameter_that_equals_its_start_is_an_error():
  form = form_for("chinchilla", grid_of_runs()("paper", PLANTED["paper"]))
  start = np.array([5.0, 0.3, 15.0, 0.5, 0.6])
  check_moved(form, start, start + 0.01)
  with pytest.raises(FieldError, match="ln_B still equals its starting value 15 after the fit"):
    check_moved(form, start, start + [0.1, 0.1, 0.0, 0.1, 0.1])


def test_a_solver_that_stops_at_once_is_found_out(monkeypatch):
  monkeypatch.setattr(solvers, "huber_from", lambda problem, phi: (phi, 1.0))
  cells = grid_of_runs()("chinchilla", PLANTED["chinchilla"])
  with pytest.raises(FieldError, match="still equals its starting value"):
    fit(cells, "chinchilla", n_starts=4)


def test_a_term_by_which_more_tokens_hurt_is_doubted():
  """Tokens that follow the size are two powers of one variable, which noise tells apart."""
  rng = np.random.default_rng(0)
  size = np.exp(np.linspace(np.log(1e7), np.log(1e9), 12))
  loss = (1.8 + 482 / size**0.35 + 2085 / (20 * size)**0.37) * np.exp(
      0.002 * rng.standard_normal(12))
  one = fit(Cells.of(loss, n_active=size, n_total=size, tokens=20 * size), "chinchilla", n_starts=8)
  wrong = [name for name in ("alpha", "beta") if one.value(name) < 0]
  assert [line.split(" = ")[0] for line in one.doubts] == wrong
  forced = dataclasses.replace(one.least_squares, theta=np.where(
      np.array(one.parameters) == "beta", -4.7, one.least_squares.theta))
  doubted = dataclasses.replace(one, least_squares=forced)
  assert any(line.startswith("beta = -4.7 means that the loss grows with tokens")
             for line in doubted.doubts)
  assert not fit(grid_of_runs()("chinchilla", PLANTED["chinchilla"]), "chinchilla",
                 n_starts=8).doubts
