"""What is said of the rehearsal comes from the records that are kept of it, bit for bit."""

import json
import math
import pathlib
import shutil

import numpy as np
import pytest

from experiments.study import arms, plan
from moe_jax.grid import load_grid, select
from moe_jax.laws.analysis import analyse
from moe_jax.laws.fit import fit
from moe_jax.laws.reduce import to_cells
from moe_jax.laws.table import read_results
from moe_jax.study import foresight, rates
from moe_jax.study.noise import ARCHITECTURE_SD, SEED_SD
from tests.experiment_files import ROOT

RESULTS = pathlib.Path(plan.RESULTS)
WHOLE = RESULTS / "study-rehearsal" / "results.csv"
PREDICTIONS = plan.FOLDER / "rehearsal_predictions.csv"
STUDY = (plan.FOLDER / "README.md").read_text()
FRONT = " ".join((ROOT / "README.md").read_text().split())
NO_TWO = "l6-d144-f72-e8-k4", "l6-d144-f72-e8-k2"


def dropped(rows):
  return [row["cell"] for row in rows
          if float(row["training_drop_rate"]) >= plan.STATISTICS["study"].most_dropped]


def test_its_tables_are_made_of_its_runs(tmp_path):
  shutil.copytree(RESULTS, tmp_path / "results")
  tables = [file.relative_to(RESULTS) for file in RESULTS.rglob("*.csv")]
  assert len(tables) == 2
  for table in tables:
    (tmp_path / "results" / table).unlink()
  assert "study-rehearsal: 32 finished" in plan.write_tables(tmp_path / "results", plan.grids())
  for table in tables:
    assert (tmp_path / "results" / table).read_bytes() == (RESULTS / table).read_bytes()


def test_fitted_rates_leave_the_rehearsals_as_they_are(tmp_path, monkeypatch):
  files = [str(plan.FOLDER / f"{name}.py") for name in plan.REHEARSALS]
  before = [load_grid(file) for file in files]
  monkeypatch.setattr(arms, "RATES", tmp_path / "rates.json")
  arms.RATES.write_text(json.dumps({"coefficients": {"intercept": -6.0, **dict.fromkeys(
      rates.VARIABLES, 0.0)}}))
  arms.cell.cache_clear()
  try:
    assert arms.cell(arms.SIZES[0], *arms.CORNERS[0]).train.learning_rate != 4e-3
    assert [load_grid(file) for file in files] == before
  finally:
    arms.cell.cache_clear()


def test_a_run_that_dropped_too_much_counts_in_no_table(tmp_path, monkeypatch):
  """By the study's rule, on the rehearsal's runs."""
  strict = plan.STATISTICS["study-rehearsal"]._replace(most_dropped=0.001)
  monkeypatch.setitem(plan.STATISTICS, "study-rehearsal", strict)
  shutil.copytree(RESULTS, tmp_path / "results")
  plan.write_tables(tmp_path / "results", {"study-rehearsal": plan.grids()["study-rehearsal"]})
  for name, left in (("rehearsal.csv", 11), ("study-rehearsal/results.csv", 32 - 18)):
    assert len(to_cells(read_results(tmp_path / "results" / name))) == left
    assert "of assignments dropped" in (tmp_path / "results" / name).read_text()


@pytest.mark.parametrize("table, law, leave_out, names", [
    ("rehearsal.csv", "paper-curved", lambda rows: (), ("c", "b_minus_c", "a", "q")),
    ("rehearsal.csv", "paper-curved", lambda rows: NO_TWO, ("b_minus_c",)),
    ("rehearsal.csv", "paper", dropped, ("b_minus_c", "c")),
    ("study-rehearsal/results.csv", "experts-or-core", lambda rows: (), ("more_experts", "core"))])
def test_its_slopes_are_those_that_are_told(table, law, leave_out, names):
  rows = read_results(RESULTS / table)
  cells = to_cells(read_results(RESULTS / table, without=leave_out(rows)))
  found = analyse(cells, law)
  assert f"({len(cells)})" in STUDY
  for name in names:
    interval = found.headline[name]
    values = interval.estimate, interval.low, interval.high
    row = "{} [{}, {}] |".format(*(f"{value:.4f}".replace("-", "−") for value in values))
    if name != "q":
      sign = -1 if name == "a" else 1
      percent = [f"{100 * math.expm1(sign * value * math.log(2)):+.2f}" for value in values]
      percent[1:] = sorted((end.lstrip("+") for end in percent[1:]), key=float)
      row += " {} % [{}, {}] |".format(*(text.replace("-", "−") for text in percent))
    assert row in STUDY, row
    if law == "paper-curved" and name != "a" and name != "q":
      assert "{} % [{}, {}]".format(percent[0].lstrip("+"), *percent[1:]) in FRONT


def test_its_rivals_are_as_told():
  for table, said in (("rehearsal.csv", {"total-active": "N_active) 0.87 %", "paper":
                                         "curvature 0.86 %", "paper-curved": "law 0.89 %",
                                         "total-sparsity": "s) 0.97 %"}),
                      ("study-rehearsal/results.csv",
                       {"total-active": "has 1.00 %", "paper-curved": "law 0.74 %"})):
    rivals = {one.law: one for one in analyse(
        to_cells(read_results(RESULTS / table)), "paper-curved", draws=99).rivals}
    for law, words in said.items():
      assert words.split()[-2] == f"{100 * rivals[law].n_exp_rmse:.2f}"
      assert words in " ".join(STUDY.split())


def test_its_scatter_is_as_told():
  fitted = fit(to_cells(read_results(RESULTS / "rehearsal.csv")), "paper-curved")
  df = len(fitted.cells) - len(fitted.parameters)
  assumed = math.hypot(SEED_SD, ARCHITECTURE_SD)
  assert (f"scatter by {100 * fitted.scatter:.2f} % of the loss ({df} degrees of freedom), where "
          f"the power calculation assumes {100 * assumed:.2f} %") in " ".join(STUDY.split())


def test_what_was_dropped_is_as_told():
  rows = read_results(WHOLE)
  assert f"{len(dropped(rows))} of {len(rows)} drop more" in " ".join(STUDY.split())
  assert max(float(row["training_drop_rate"]) for row in rows) == pytest.approx(0.05, abs=0.005)


def test_its_predictions_are_those_of_the_runs_before_them():
  predictions = foresight.read(str(PREDICTIONS))
  names = [one["cell"] for one in predictions]
  made = foresight.predict(select(f"{plan.FOLDER / 'rehearsal.py'}:{','.join(names)}"),
                           read_results(WHOLE, without=names), "paper-curved")
  for ours, theirs in zip(made.rows, predictions, strict=True):
    assert (ours["cell"], ours["identity"]) == (theirs["cell"], theirs["identity"])
    assert float(ours["predicted"]) == pytest.approx(theirs["predicted"], abs=1e-6)


def test_its_predictions_turned_out_as_told():
  compared = foresight.compare(foresight.read(str(PREDICTIONS)), read_results(WHOLE))
  assert len(compared.measured) == 14 and compared.covered == 11
  assert all(error < 0 for error in compared.errors)
  median = f"{100 * np.median(np.abs(compared.errors)):.1f} %"
  assert f"median error {median}" in STUDY and f"missed by {median} (median)" in FRONT
  assert f"mean −{-100 * np.mean(compared.errors):.1f} %" in STUDY
