"""What is said of the rehearsal comes from the records that are kept of it, bit for bit."""

import functools
import json
import math
import pathlib
import shutil

import numpy as np
import pytest

from experiments.study import arms, plan
from moe_jax.grid import load_grid, select
from moe_jax.laws import intervals
from moe_jax.laws.analysis import analyse
from moe_jax.laws.fit import fit
from moe_jax.laws.reduce import to_cells
from moe_jax.laws.table import read_results
from moe_jax.study import foresight, paired, rates
from moe_jax.study.noise import ARCHITECTURE_SD, SEED_SD
from tests.experiment_files import ROOT

RESULTS = pathlib.Path(plan.RESULTS)
FIRST, AGAIN = " ".join((plan.FOLDER / "rehearsals.md").read_text().split()).split(
    "## Again, without drops")
AGAIN, TENTH = AGAIN.split("## A tenth of the tokens")
FRONT = " ".join((ROOT / "README.md").read_text().split())
NO_TWO = "l6-d144-f72-e8-k4", "l6-d144-f72-e8-k2"


def whole(experiment):
  return RESULTS / experiment / "results.csv"


CAPACITY, DROPLESS = whole("study-rehearsal"), whole("study-rehearsal-dropless")
TENTH_TABLE = whole("study-rehearsal-tenth")


def dropped(rows):
  return [row["cell"] for row in rows
          if float(row["training_drop_rate"]) >= plan.STATISTICS["study"].most_dropped]


def test_their_tables_are_made_of_their_runs(tmp_path):
  shutil.copytree(RESULTS, tmp_path / "results")
  tables = [file.relative_to(RESULTS) for file in RESULTS.rglob("*.csv")]
  assert len(tables) == 6
  for table in tables:
    (tmp_path / "results" / table).unlink()
  lines = plan.write_tables(tmp_path / "results", plan.grids())
  assert {"study-rehearsal: 32 finished", "study-rehearsal-dropless: 44 finished"} <= set(lines)
  (tenth,) = (line for line in lines if line.startswith("study-rehearsal-tenth: "))
  finished = int(tenth.split()[1])
  architectures = min(finished, 48) // 3 + max(0, finished - 48)  # 2M at three lengths, then 6M
  assert f"**{architectures} of its 32 architectures have run so far**" in TENTH
  assert tenth == f"study-rehearsal-tenth: {finished} finished, {64 - finished} not run"
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


def no_two(rows):
  """And none of their seeds."""
  return [row["cell"] for row in rows if row["cell"].startswith(NO_TWO)]


def nothing(rows):
  del rows
  return ()


@functools.cache
def analysed(table, law, leave_out):
  """The analysis of a table of RESULTS without some of its cells."""
  table = RESULTS / table
  return analyse(to_cells(read_results(table, without=leave_out(read_results(table)))), law)


@pytest.mark.parametrize("told, table, law, leave_out, names", [
    (FIRST, "rehearsal.csv", "paper-curved", nothing, ("c", "b_minus_c", "a", "q")),
    (FIRST, "rehearsal.csv", "paper-curved", no_two, ("b_minus_c",)),
    (FIRST, "rehearsal.csv", "paper", dropped, ("b_minus_c", "c")),
    (FIRST, "study-rehearsal/results.csv", "experts-or-core", nothing, ("more_experts", "core")),
    (AGAIN, "rehearsal_dropless.csv", "paper-curved", nothing, ("c", "b_minus_c", "a", "q")),
    (AGAIN, "rehearsal_dropless.csv", "paper-curved", no_two, ("b_minus_c",)),
    (AGAIN, "study-rehearsal-dropless/results.csv", "experts-or-core", nothing,
     ("more_experts", "core"))])
def test_slopes_are_those_that_are_told(told, table, law, leave_out, names):
  found = analysed(table, law, leave_out)
  assert f"({len(found.fitted.cells)})" in told
  for name in names:
    interval = found.headline[name]
    values = interval.estimate, interval.low, interval.high
    row = "{} [{}, {}] |".format(*(f"{value:.4f}".replace("-", "−") for value in values))
    if name != "q":
      sign = -1 if name == "a" else 1
      percent = [f"{100 * math.expm1(sign * value * math.log(2)):+.2f}" for value in values]
      percent[1:] = sorted((end.lstrip("+") for end in percent[1:]), key=float)
      row += " {} % [{}, {}] |".format(*(text.replace("-", "−") for text in percent))
    assert row in told, row
    if leave_out is nothing and (name == "b_minus_c" or name == "c" and told is AGAIN):
      assert "{} % [{}, {}]".format(percent[0].lstrip("+"), *percent[1:]) in FRONT


@pytest.mark.parametrize("told, table, law, said", [
    (FIRST, "rehearsal.csv", "paper-curved", {
        "total-active": "N_active) 0.87 %", "paper": "curvature 0.86 %",
        "paper-curved": "law 0.89 %", "total-sparsity": "s) 0.97 %"}),
    (FIRST, "study-rehearsal/results.csv", "experts-or-core", {
        "total-active": "has 1.00 %", "paper-curved": "law 0.74 %"}),
    (AGAIN, "rehearsal_dropless.csv", "paper-curved", {
        "total-active": "N_active) 1.08 %", "paper": "curvature 0.92 %",
        "paper-curved": "law 0.85 %", "total-sparsity": "s) 0.94 %"})])
def test_rivals_are_as_told(told, table, law, said):
  """They are fitted beside any law."""
  rivals = {one.law: one for one in analysed(table, law, nothing).rivals}
  for law, words in said.items():
    assert words.split()[-2] == f"{100 * rivals[law].n_exp_rmse:.2f}"
    assert words in told


@pytest.mark.parametrize("told, table", [(FIRST, "rehearsal.csv"),
                                         (AGAIN, "rehearsal_dropless.csv")])
def test_by_pairs_it_is_as_told(told, table):
  found = intervals.by_pair(fit(to_cells(read_results(RESULTS / table)), "paper-curved"))
  ends = "[{0.low:.4f}, {0.high:.4f}]".format(found["b_minus_c"]).replace("-", "−")
  assert f"{ends}" in told and "a pair (n_exp, s)" in told


def test_at_the_edge_it_is_as_told():
  table = RESULTS / "rehearsal.csv"
  cells = to_cells(read_results(table, without=dropped(read_results(table))))
  student = intervals.profile(fit(cells, "paper"))["b_minus_c"]
  assert f"Student's t has [{student.low:.4f}, {student.high:.4f}]" in FIRST


def test_the_scatter_is_as_told():
  first, again = (fit(to_cells(read_results(RESULTS / table)), "paper-curved")
                  for table in ("rehearsal.csv", "rehearsal_dropless.csv"))
  df = len(first.cells) - len(first.parameters)
  assumed = math.hypot(SEED_SD, ARCHITECTURE_SD)
  assert (f"scatter by {100 * first.scatter:.2f} % of the loss ({df} degrees of freedom), where "
          f"the power calculation assumes {100 * assumed:.2f} %") in FIRST
  assert f"The residuals scatter by {100 * again.scatter:.2f} %" in AGAIN


def test_seeds_lie_as_far_apart_as_told():
  losses = {}
  for row in read_results(DROPLESS):
    losses.setdefault(row["cell"].partition("-s")[0], []).append(float(row["loss"]))
  repeated = {cell: found for cell, found in losses.items() if len(found) > 1}
  df = sum(len(found) - 1 for found in repeated.values())
  variance = sum(np.var(np.log(found), ddof=1) * (len(found) - 1)
                 for found in repeated.values()) / df
  sd = 100 * math.sqrt(variance)
  assert len(repeated) == 4 and f"{sd:.2f} % of the loss ({df} degrees of freedom)" in AGAIN
  assert f"assumes {100 * SEED_SD:.1f} % for runs" in AGAIN
  assert f"between seeds alone is {sd:.1f} %" in FRONT
  found = repeated["l6-d144-f72-e8-k4"]
  assert f"has seeds from {min(found):.3f} to {max(found):.3f}" in AGAIN


def test_what_drops_were_part_of_is_as_told():
  cells = paired.pairs(read_results([str(CAPACITY), str(DROPLESS)]), "dispatch", "capacity",
                       "dropless")
  assert f"of the {len(cells)} pairs of one seed" in AGAIN
  fitted = fit(cells, "paper")
  gain = intervals.bootstrap(fitted)["b_minus_c"]
  assert f"by {-gain.estimate:.4f} [{-gain.high:.4f}, {-gain.low:.4f}] of ln L per" in AGAIN
  gain = intervals.by_pair(fitted)["b_minus_c"]
  assert f"[{-gain.high:.4f}, {-gain.low:.4f}] with errors".replace("-", "−") in AGAIN


def test_what_was_dropped_is_as_told():
  rows = read_results(CAPACITY)
  assert f"{len(dropped(rows))} of {len(rows)} drop more" in FIRST
  assert max(float(row["training_drop_rate"]) for row in rows) == pytest.approx(0.055, abs=0.0005)
  assert all(float(row["training_drop_rate"]) == 0 for row in read_results(DROPLESS))


def test_the_first_predictions_are_those_of_the_runs_before_them():
  predictions = foresight.read(str(plan.FOLDER / "rehearsal_predictions.csv"))
  names = [one["cell"] for one in predictions]
  made = foresight.predict(select(f"{plan.FOLDER / 'rehearsal.py'}:{','.join(names)}"),
                           read_results(CAPACITY, without=names), "paper-curved")
  _require_equal(made.rows, predictions)


def test_the_second_predictions_are_those_of_the_first_rehearsal():
  predictions = foresight.read(str(plan.FOLDER / "rehearsal_dropless_predictions.csv"))
  made = foresight.predict(select(str(plan.FOLDER / "rehearsal_dropless.py")),
                           read_results(CAPACITY), "paper-curved")
  _require_equal(made.rows, predictions)


def test_the_third_predictions_are_those_of_its_small_cells_and_the_second_rehearsal():
  predictions = foresight.read(str(plan.FOLDER / "rehearsal_tenth_predictions.csv"))
  names = [one["cell"] for one in predictions]
  rows = read_results(DROPLESS) + read_results(TENTH_TABLE, without=names)
  made = foresight.predict(select(str(plan.FOLDER / "rehearsal_tenth_large.py")),
                           [row for row in rows if row["seed_init"] == 0], "paper-tokens")
  assert list(made.fitted.identified.refused) == ["ln_E"] and "irreducible loss at 0" in TENTH
  _require_equal(made.rows, predictions)


def _require_equal(made, predictions):
  for ours, theirs in zip(made, predictions, strict=True):
    assert (ours["cell"], ours["identity"]) == (theirs["cell"], theirs["identity"])
    for name in ("predicted", "low", "high"):
      assert float(ours[name]) == pytest.approx(theirs[name], abs=1e-6)
    assert ours["fit"] == theirs["fit"]


def test_the_predictions_turned_out_as_told():
  first = foresight.compare(foresight.read(str(plan.FOLDER / "rehearsal_predictions.csv")),
                            read_results(CAPACITY))
  assert len(first.measured) == 14 and first.covered == 11
  assert all(error < 0 for error in first.errors)
  assert f"median error {100 * np.median(np.abs(first.errors)):.1f} %" in FIRST
  assert f"mean −{-100 * np.mean(first.errors):.1f} %" in FIRST
  again = foresight.compare(
      foresight.read(str(plan.FOLDER / "rehearsal_dropless_predictions.csv")),
      read_results(DROPLESS))
  median = 100 * np.median(np.abs(again.errors))
  assert f"median error {median:.2f} %" in AGAIN and f"missed by {median:.1f} % (median)" in FRONT
  assert f"mean −{-100 * np.mean(again.errors):.1f} %, {again.covered} of 44" in AGAIN
  assert f"{again.covered} lie in their interval" in FRONT
