"""Predictions are of the planted law, cover what they say, and are not made of what is known."""

import numpy as np
import pytest

from moe_jax.errors import FieldError
from moe_jax.grid import Cell
from moe_jax.laws.cells import Cells
from moe_jax.laws.fit import fit
from moe_jax.laws.table import UNUSED, read_results
from moe_jax.study import foresight
from tests.experiment_files import run_module
from tests.study import planted

SMALL = planted.grid(sizes=(700_000, 2_000_000))
LARGE = planted.grid(sizes=(5_000_000,))
SELECTED = tuple(Cell(LARGE.name, f"large.py:{name}", name, config)
                 for name, config in zip(LARGE.names, LARGE.cells, strict=True))


def rows_of(folder, grid, seed=0):
  return read_results(planted.write_runs(folder, grid, configs=False, seed=seed))


def test_intervals_cover_further_runs(tmp_path):
  covered, total, errors = 0, 0, []
  for seed in range(30):
    found = foresight.predict(SELECTED, rows_of(tmp_path, SMALL, seed), "paper")
    assert len(found.rows) == len(SELECTED)
    predictions = [row | {name: float(row[name]) for name in ("predicted", "low", "high", "level")}
                   for row in found.rows]
    compared = foresight.compare(predictions, [
        row | {"identity": one["identity"]} for row, one in
        zip(rows_of(tmp_path, LARGE, 1000 + seed), found.rows, strict=True)])
    covered, total = covered + compared.covered, total + len(compared.measured)
    errors += list(compared.errors)
  assert 0.9 < covered / total <= 1
  assert abs(np.mean(errors)) < 0.003


def test_the_fit_has_a_fingerprint_of_its_own(tmp_path):
  one, again, other = (foresight.predict(SELECTED, rows_of(tmp_path, SMALL, seed), "paper")
                       for seed in (0, 0, 1))
  assert one.rows == again.rows
  assert one.rows[0]["fit"] != other.rows[0]["fit"]


def test_what_was_measured_is_not_predicted(tmp_path):
  rows = rows_of(tmp_path, SMALL)
  mine = [Cell(SMALL.name, "small.py", name, config)
          for name, config in zip(SMALL.names, SMALL.cells, strict=True)]
  first = foresight.predict(mine[:1], rows, "paper").rows[0]["identity"]
  rows[0]["identity"] = first
  with pytest.raises(FieldError, match="already has the loss of .*: a measured cell cannot"):
    foresight.predict(mine, rows, "paper")


def test_written_then_compared(tmp_path):
  results = planted.write_runs(tmp_path, SMALL)
  config = tmp_path / "large.py"
  config.write_text("from tests.study import planted\n\n\ndef get_grid():\n"
                    "  return planted.grid(sizes=(5_000_000,))\n")
  file = tmp_path / "predictions.csv"
  command = ("-m", "moe_jax.study.predict", f"--results={results}")
  made = run_module(*command, f"--config={config}", f"--write={file}")
  assert made.returncode == 0, made.stderr
  assert "6 of 6 cells predicted by paper" in made.stdout
  again = run_module(*command, f"--config={config}", f"--write={file}")
  assert again.returncode == 2 and "predictions are never overwritten" in again.stderr
  compared = run_module(*command, f"--predictions={file}")
  assert compared.returncode == 0, compared.stderr
  assert compared.stdout.count("not run") == 6
  assert compared.stdout.endswith("none of them has been measured\n")
  for arguments, line in (([], "error: --config=None: give either --config"),
                          ([f"--predictions={config}"], "was not written by --write")):
    done = run_module(*command, *arguments)
    assert done.returncode == 2 and line in done.stderr and done.stderr.count("\n") == 1


def test_of_several_tables_and_what_they_know_already_is_told(tmp_path):
  mine = [Cell(SMALL.name, "small.py", name, config)
          for name, config in zip(SMALL.names, SMALL.cells, strict=True)]
  paths = []
  for folder, grid in ((tmp_path / "small", SMALL), (tmp_path / "large", LARGE)):
    folder.mkdir()
    paths.append(planted.write_runs(folder, grid, configs=False))
  rows = read_results(paths)
  assert len(rows) == len(SMALL.cells) + len(LARGE.cells)
  rows[0] |= {"identity": foresight.predict(mine[:1], rows, "paper").rows[0]["identity"],
              UNUSED: "does not count"}
  found = foresight.predict(mine[:2], rows, "paper", "here")
  assert found.notes[-1] == ("1 of them already have a loss in here that the fit does not use, so "
                             f"they are not predictions: {mine[0].name}")


def test_a_prediction_is_of_one_run_also_where_cells_are_means_of_several():
  rng, seeds, noise = np.random.default_rng(0), 4, 0.004
  n_exp, sparsity = np.tile([8.0, 16, 32, 64], 12), np.repeat([2.0, 4, 8], 16)
  n_total = np.tile(np.repeat([2e6, 4e6, 8e6, 16e6], 4), 3)
  scatter = []
  for _ in range(200):
    loss = np.exp(noise / np.sqrt(seeds) * rng.standard_normal(48))
    cells = Cells.of(loss, n_total=n_total, n_exp=n_exp, sparsity=sparsity, seeds=seeds,
                     loss_se=loss * noise / np.sqrt(seeds))
    scatter.append(fit(cells, "paper").scatter_of_one_run**2)
  assert np.sqrt(np.mean(scatter)) == pytest.approx(noise, rel=0.05)
