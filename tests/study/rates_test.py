"""Sweeps with known optima give them back; those that do not show one are refused."""

import json
import math

import numpy as np
import pytest

from moe_jax.errors import FieldError
from moe_jax.laws.table import LEFT_OUT, UNUSED
from moe_jax.study import rate_report, rates

TRUTH = {"intercept": -2.0, "n_total": -0.25, "sparsity": -0.1, "n_exp": 0.05}
CORNERS = ((2e6, 8, 4), (2e6, 64, 32), (2e6, 32, 2), (2e6, 64, 4))


def rows_of(n_total=2e6, n_exp=8, n_topk=4, steps=(-2, -1, 0, 1, 2), off=0.3, curvature=0.02):
  """A sweep around a rate whose optimum, by TRUTH, lies `off` steps of sqrt(2) above it."""
  best = rates.Rates(TRUTH).at(n_total, n_exp / n_topk, n_exp)
  rows = []
  for step in steps:
    rate = best * 2**((step - off) / 2)
    rows.append({
        "cell": f"n{n_total:g}-e{n_exp}-k{n_topk}-lr{step}", "identity": f"{step}", "n_layers": 6,
        "d_model": 144, "d_expert": 72, "n_exp": n_exp, "n_topk": n_topk, "n_total": n_total,
        "n_active": 1e6, "tokens": 1e8, "learning_rate": rate, "state": "finished",
        "loss": math.exp(0.5 + curvature * math.log(rate / best)**2)})
  return rows


def sweep_of(**changes):
  (sweep,) = rates.sweeps_of(rows_of(**changes), "here")
  return sweep


def test_the_planted_law_is_found():
  rows = [row for n_total in (2e6, 16e6) for _, n_exp, n_topk in CORNERS
          for row in rows_of(n_total, n_exp, n_topk, off=0.4 * (n_exp == 64) - 0.2)]
  found = rates.fit_rates([rates.optimum(sweep, 0.002)
                           for sweep in rates.sweeps_of(rows, "here")], "here")
  assert dict(found.rates.coefficients) == pytest.approx(TRUTH, rel=1e-6)
  assert found.worst_factor == pytest.approx(1)
  kept = json.loads(json.dumps(rate_report.as_dict(found, b"table")))
  assert len(kept["optima"]) == 8 and kept["optima"][0]["runs"] == ["-2", "-1", "0", "1", "2"]


def test_the_interval_is_that_of_repeated_noise():
  sweep, rng, found = sweep_of(), np.random.default_rng(0), []
  clean = rates.optimum(sweep, 0.0005)
  for _ in range(400):
    noisy = rates.Sweep(**vars(sweep) | {
        "log_loss": sweep.log_loss + 0.0005 * rng.standard_normal(5)})
    found.append(math.log(rates.optimum(noisy, 0.0005).rate))
  assert math.log(clean.high / clean.rate) == pytest.approx(1.96 * np.std(found), rel=0.15)
  assert not math.isfinite(rates.optimum(sweep, 0.05).high)


@pytest.mark.parametrize("off,curvature,says", [
    (5, 0.02, "is best at the highest of 5 rates"), (-5, 0.02, "is best at the lowest"),
    (0.3, -0.02, "is best at the")])
def test_an_edge_is_refused_with_the_rates_to_add(off, curvature, says):
  with pytest.raises(FieldError, match=says) as refused:
    rates.optimum(sweep_of(off=off, curvature=curvature), 0.002)
  assert "e8-k4" in refused.value.value
  if off > 0 and curvature > 0:
    highest = sweep_of(off=off).rates[-1]
    assert refused.value.accepted.endswith(
        f"add {highest * 2**0.5:.4g} and {highest * 2:.4g}")


def test_a_best_rate_inside_whose_parabola_is_lowest_outside_is_no_edge():
  """A cliff on one side, and noise on the other."""
  rows = rows_of(steps=(-3, -2, -1, 0, 1, 2, 3), off=0)
  for row, log_loss in zip(rows, (0.508, 0.512, 0.513, 0.514, 0.4999, 0.5, 0.5), strict=True):
    row["loss"] = math.exp(log_loss)
  (sweep,) = rates.sweeps_of(rows, "here")
  best = sweep.rates[4]
  with pytest.raises(FieldError) as refused:
    rates.optimum(sweep, 0.002)
  assert refused.value.accepted.startswith(f"is best at {best:.4g}, but the parabola")
  assert refused.value.accepted.endswith(
      f"add {best / 2**0.25:.4g} and {best * 2**0.25:.4g}, or seeds")


def test_an_optimum_that_noise_does_not_bound_is_no_part_of_the_law():
  sweeps = [sweep_of(), sweep_of(n_exp=64, curvature=0.001)]
  with pytest.raises(FieldError, match="which noise of 0.2 % between seeds does not bound: "
                     "add .* and .*, or seeds$") as refused:
    rate_report.optima_of(sweeps, 0.002, "here")
  assert "e64" in str(refused.value) and "e8-" not in str(refused.value)
  assert len(rate_report.optima_of(sweeps, 1e-5, "here")) == 2


def test_next_to_one_that_diverged_the_rate_between_is_asked_for():
  rows = rows_of(off=1.5)
  rows[-1] |= {UNUSED: "unfinished", "state": "diverged"}
  (sweep,) = rates.sweeps_of(rows, "here")
  between = math.sqrt(rows[-1]["learning_rate"] * rows[-2]["learning_rate"])
  with pytest.raises(FieldError, match=f"which has no loss: add {between:.4g}$"):
    rates.optimum(sweep, 0.002)


def test_next_to_one_that_has_not_run_there_is_nothing_to_add():
  rows = rows_of(off=1.5)
  rows[-1] |= {UNUSED: "unfinished", "state": "not run"}
  (sweep,) = rates.sweeps_of(rows, "here")
  with pytest.raises(FieldError, match=f"have not run: first run {rows[-1]['learning_rate']:.4g}$"):
    rates.optimum(sweep, 0.002)


def test_a_sweep_that_is_left_out_is_none():
  left_out = [row | {UNUSED: f"{LEFT_OUT} --without={row['cell']}"} for row in rows_of(n_exp=64)]
  (sweep,) = rates.sweeps_of([*rows_of(), *left_out], "here")
  assert sweep.variables["n_exp"] == 8


def test_runs_of_several_recipes_are_no_sweep():
  rows = rows_of()
  rows[0]["recipe_hash"] = "another"
  with pytest.raises(FieldError, match="differ in a recipe setting that has no column"):
    rates.sweeps_of(rows, "here")


def test_corners_of_one_size_do_not_tell_sizes_apart():
  rows = [row for _, n_exp, n_topk in CORNERS for row in rows_of(2e6, n_exp, n_topk)]
  with pytest.raises(FieldError, match="do not separate the effects of N_total"):
    rates.fit_rates([rates.optimum(one, 0.002) for one in rates.sweeps_of(rows, "x")], "x")


def test_a_law_is_held_against_other_sweeps():
  off_by_one = rates.Rates(TRUTH | {"intercept": TRUTH["intercept"] + math.log(2) / 2})
  lines = rate_report.check([sweep_of(), sweep_of(off=9)], off_by_one, 0.0005)
  assert f"maximum {100 * 0.02 * (math.log(2) / 2)**2:.2g} %, 1 sweeps" in lines[-2]
  assert lines[-1].startswith("1 of 2 have no optimum")


def test_what_is_no_law_is_refused(tmp_path):
  (tmp_path / "rates.json").write_text("{}")
  with pytest.raises(FieldError, match="is damaged"):
    rates.read(tmp_path / "rates.json")
  with pytest.raises(FieldError, match="cannot be read"):
    rates.read(tmp_path / "none.json")
