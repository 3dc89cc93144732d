"""Bands around a law are as wide as theory has them where theory knows it."""

import numpy as np
import pytest
from scipy import stats

from moe_jax.errors import FieldError
from moe_jax.laws import prediction, validate
from moe_jax.laws.fit import fit
from moe_jax.laws.reduce import to_cells
from tests.laws.results_file import TRUTH, rows_of


def test_the_band_is_near_the_regression_interval_of_the_mean():
  """On average over ten grids: on one the jackknife is up to a third off."""
  n_exp, log_ratio = np.geomspace(8, 128, 20), []
  for seed in range(10):
    found = fit(to_cells(rows_of(seed, n_cells=40)), "paper", n_starts=2)
    at = prediction.points(found, n_exp=n_exp)
    band = prediction.band(found, validate.leave_one_architecture_out(found), at)
    np.testing.assert_allclose(np.log(band.loss), found.log_loss(at))
    x_NP, x_QP = found.form.matrix(found.cells)[0], found.form.matrix(at)[0]
    n, p = x_NP.shape
    error = np.sqrt(np.einsum("qp,pr,qr->q", x_QP, np.linalg.inv(x_NP.T @ x_NP), x_QP)
                    * np.sum(found.residual**2) / (n - p))
    width = np.log(band.high / band.low) / 2
    log_ratio.append(np.log(width / (stats.t.ppf(0.975, n - p) * error)))
  np.testing.assert_allclose(np.exp(np.mean(log_ratio, axis=0)), 1, atol=0.12)


def test_the_band_holds_the_planted_law_as_often_as_it_says():
  held = []
  for seed in range(150):
    found = fit(to_cells(rows_of(seed, learning_rates=1, n_cells=16)), "paper", n_starts=2)
    at = prediction.points(found, sparsity=np.array([4.0]))
    planted = (TRUTH["c0"] - TRUTH["a"] * at.log("n_total") + TRUTH["b_minus_c"] * at.log("n_exp")
               + TRUTH["c"] * at.log("sparsity"))
    # Learning rates that miss their optimum cost 0.02 * 0.3² on average.
    planted += 0.02 * 0.09
    band = prediction.band(found, validate.leave_one_architecture_out(found), at)
    held.append(band.low[0] <= np.exp(planted[0]) <= band.high[0])
  assert 0.91 <= np.mean(held) <= 0.985


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
