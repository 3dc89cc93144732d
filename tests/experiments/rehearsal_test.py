"""What is said of the rehearsal comes from the records that are kept of it, bit for bit."""

import pathlib
import shutil

import numpy as np
import pytest

from experiments.study import plan
from moe_jax.laws.fit import fit
from moe_jax.laws.reduce import to_cells
from moe_jax.laws.table import read_results
from moe_jax.study import foresight

RESULTS = pathlib.Path(plan.RESULTS)
README = (pathlib.Path(plan.FOLDER) / "README.md").read_text()


def test_its_tables_are_made_of_its_runs(tmp_path):
  shutil.copytree(RESULTS, tmp_path / "results")
  tables = [file.relative_to(RESULTS) for file in RESULTS.rglob("*.csv")]
  assert len(tables) == 2
  for table in tables:
    (tmp_path / "results" / table).unlink()
  assert "study-rehearsal: 32 finished" in plan.write_tables(tmp_path / "results", plan.grids())
  for table in tables:
    assert (tmp_path / "results" / table).read_bytes() == (RESULTS / table).read_bytes()


@pytest.mark.parametrize("table, law, name", [
    ("rehearsal.csv", "paper-curved", "c"), ("rehearsal.csv", "paper-curved", "b_minus_c"),
    ("rehearsal.csv", "paper-curved", "a"),
    ("study-rehearsal/results.csv", "experts-or-core", "more_experts")])
def test_its_slopes_are_those_that_are_told(table, law, name):
  found = fit(to_cells(read_results(RESULTS / table)), law)
  assert f"| {found.value(name):.4f} [" in README


def test_its_predictions_turned_out_as_told():
  compared = foresight.compare(
      foresight.read(str(plan.FOLDER / "rehearsal_predictions.csv")),
      read_results(RESULTS / "study-rehearsal" / "results.csv"))
  assert len(compared.measured) == 14 and compared.covered == 11
  assert f"Median error {100 * np.median(np.abs(compared.errors)):.1f} %" in README
  assert f"mean −{-100 * np.mean(compared.errors):.1f} %" in README
