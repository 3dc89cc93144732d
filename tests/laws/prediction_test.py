"""Bands around a law are as wide as theory has them where theory knows it."""

import numpy as np
import pytest
from scipy import stats

from moe_jax.errors import FieldError
from moe_jax.laws import prediction, validate
from moe_jax.laws.fit import fit
from moe_jax.laws.reduce import to_cells
from tests.laws.results_file import TRUTH, rows_of


@pytest.fixture(scope="module")
def fitted():
  return fit(to_cells(rows_of(n_cells=40)), "paper")


def test_the_band_is_near_the_regression_interval_of_the_mean(fitted):
  at = prediction.points(fitted, n_exp=np.geomspace(8, 128, 20))
  band = prediction.band(fitted, validate.leave_one_architecture_out(fitted), at)
  x_NP, x_QP = fitted.form.matrix(fitted.cells)[0], fitted.form.matrix(at)[0]
  n, p = x_NP.shape
  error = np.sqrt(np.einsum("qp,pr,qr->q", x_QP, np.linalg.inv(x_NP.T @ x_NP), x_QP)
                  * np.sum(fitted.residual**2) / (n - p))
  width = np.log(band.high / band.low) / 2
  np.testing.assert_allclose(width, stats.t.ppf(0.975, n - p) * error, rtol=0.35)
  np.testing.assert_allclose(np.log(band.loss), fitted.log_loss(at))


def test_the_band_holds_the_planted_law_most_of_the_time():
  held = []
  for seed in range(60):
    found = fit(to_cells(rows_of(seed, learning_rates=1, n_cells=16)), "paper")
    at = prediction.points(found, sparsity=np.array([4.0]))
    planted = (TRUTH["c0"] - TRUTH["a"] * at.log("n_total") + TRUTH["b_minus_c"] * at.log("n_exp")
               + TRUTH["c"] * at.log("sparsity"))
    # Learning rates that miss their optimum cost 0.02 * 0.3² on average.
    planted += 0.02 * 0.09
    band = prediction.band(found, validate.leave_one_architecture_out(found), at)
    held.append(band.low[0] <= np.exp(planted[0]) <= band.high[0])
  assert 0.85 <= np.mean(held) <= 1.0


def test_others_are_held_at_a_value_that_occurs(fitted):
  at = prediction.points(fitted, sparsity=np.array([2.0, 4.0]))
  assert at.columns["n_exp"][0] in fitted.cells.columns["n_exp"]
  assert at.columns["n_total"][0] in fitted.cells.columns["n_total"]
  assert at.columns["sparsity"].tolist() == [2.0, 4.0]


def test_no_band_where_an_architecture_cannot_be_spared(fitted):
  parts = validate.leave_one_architecture_out(fitted)
  parts[3] = validate.LeftOut("x", None, None, "no")
  with pytest.raises(FieldError, match="without one of the"):
    prediction.band(fitted, parts, fitted.cells)
