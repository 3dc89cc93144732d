"""Pairs of runs: what is added to the slopes is found, and what is no pair is told."""

import dataclasses

import numpy as np
import pytest

from moe_jax.errors import FieldError
from moe_jax.laws.fit import fit
from moe_jax.laws.table import UNUSED, read_results
from moe_jax.study import paired
from tests.experiment_files import run_module
from tests.study import planted

GRID = planted.grid(sizes=(700_000, 2_000_000), seeds=2)
LONGER = dataclasses.replace(GRID, cells=tuple(
    dataclasses.replace(cell, train=dataclasses.replace(cell.train, steps=2 * cell.train.steps))
    for cell in GRID.cells))


@pytest.fixture
def tables(tmp_path):
  paths = []
  for number, grid in enumerate((GRID, LONGER)):
    folder = tmp_path / str(number)
    folder.mkdir()
    paths.append(planted.write_runs(folder, grid, configs=False, seed=number))
  return paths


def of_tokens(tables, added=0.0):
  rows = read_results(tables)
  first, second = sorted({row["tokens"] for row in rows})
  for row in rows:
    if row["tokens"] == second:
      row["loss"] *= row["n_exp"]**added
  return rows, f"{first:.0f}", f"{second:.0f}"


def test_what_is_added_to_a_slope_is_found(tables):
  rows, first, second = of_tokens(tables, added=0.02)
  cells = paired.pairs(rows, "tokens", first, second)
  assert cells.seeds.tolist() == [2.0] * len(cells)
  assert cells.n_architectures == len(cells) == len(GRID.cells) // 2
  fitted = fit(cells, "paper")
  assert fitted.value("b_minus_c") == pytest.approx(0.02, abs=0.002)
  assert fitted.value("c") == pytest.approx(0, abs=0.002)
  back = fit(paired.pairs(rows, "tokens", second, first), "paper")
  np.testing.assert_allclose(back.least_squares.theta, -fitted.least_squares.theta, atol=1e-12)


def test_what_pairs_have_in_common_cancels(tables):
  rows, first, second = of_tokens(tables)
  before = fit(paired.pairs(rows, "tokens", first, second), "paper").least_squares.theta
  for row in rows:
    row["loss"] *= 1 + 0.1 * (row["d_model"] % 7)
  after = fit(paired.pairs(rows, "tokens", first, second), "paper").least_squares.theta
  np.testing.assert_allclose(after, before, atol=1e-12)


def test_a_run_alone_and_what_else_differs_is_told(tables):
  rows, first, second = of_tokens(tables)
  rows[0][UNUSED] = "diverged"
  rows[1]["weight_decay"] = "0.9"
  notes = paired.pairs(rows, "tokens", first, second).notes
  assert notes[0].startswith(f"{len(GRID.cells) - 1} pairs of {len(GRID.cells) // 2} arch")
  assert notes[1].startswith("without a partner: ") and notes[1].count(",") == 0
  assert notes[2] == "THE PAIRS ALSO DIFFER IN weight_decay"


@pytest.mark.parametrize("of, values, told", [
    ("tokens", ("1", None), "values='1': no run has this value of tokens; available: "),
    ("token", (None, None), "of='token': is not a column of all"),
    ("loss", ("LOSS", "LOSS2"), "no architecture has runs of both")])
def test_what_are_no_pairs_is_refused(tables, of, values, told):
  rows, *lengths = of_tokens(tables)
  for row in rows:
    row["loss"] = 2.0 if row["n_exp"] == 8 else 3.0
  names = {"LOSS": "2", "LOSS2": "3"}
  chosen = [names.get(value, value) or length for value, length in zip(values, lengths,
                                                                       strict=True)]
  with pytest.raises(FieldError, match=told):
    paired.pairs(rows, of, *chosen)


def test_twice_the_same_run_is_refused(tables):
  rows, first, second = of_tokens(tables)
  with pytest.raises(FieldError, match="both have tokens"):
    paired.pairs([*rows, dict(rows[0])], "tokens", first, second)


def test_the_command(tables):
  _, first, second = of_tokens(tables)
  command = ("-m", "moe_jax.study.paired", *(f"--results={table}" for table in tables))
  done = run_module(*command, "--of=tokens", f"--values={first},{second}")
  assert done.returncode == 0, done.stderr
  assert "the loss changes by" in done.stdout and "b_minus_c" in done.stdout
  refused = run_module(*command, f"--values={first}")
  assert refused.returncode == 2 and "must be two different values, FIRST,SECOND" in refused.stderr


def test_pairs_of_several_lengths_are_not_taken_for_seeds(tables):
  rows, first, second = of_tokens(tables)
  for row in rows:
    row["capacity_factor"] = "1.25" if row["seed_init"] else "2.0"
    row["seed_init"] = 0.0
  with pytest.raises(FieldError, match=f"the pairs have 2 lengths.*--where=tokens={second}"):
    paired.pairs(rows, "capacity_factor", "2", "1.25")
  one = [row for row in rows if row["tokens"] == float(first)]
  assert len(paired.pairs(one, "capacity_factor", "2", "1.25")) == len(GRID.cells) // 2


def test_a_column_that_one_table_lacks_is_none(tables):
  rows, first, second = of_tokens(tables)
  del rows[-1]["dispatch"]
  with pytest.raises(FieldError, match="of='dispatch': is not a column of all"):
    paired.pairs(rows, "dispatch", "capacity", "dropless")
