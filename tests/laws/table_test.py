"""Bad results files: each is refused with one line that names what is wrong and what helps."""

import math
import pathlib

import pytest

from moe_jax.errors import FieldError
from moe_jax.laws.reduce import to_cells
from moe_jax.laws.table import read_results
from tests.laws.results_file import rows_of, write

ONE_RATE = dict(learning_rates=1, n_cells=8)


def refusal(tmp_path, rows, where=(), without=()) -> str:
  with pytest.raises(FieldError) as error:
    to_cells(read_results(write(tmp_path, rows), where, without))
  line = str(error.value)
  assert "\n" not in line
  return line


def test_a_good_file_is_read(tmp_path):
  rows = rows_of(**ONE_RATE)
  read = read_results(write(tmp_path, rows))
  assert [row["loss"] for row in read] == [row["loss"] for row in rows]
  assert len(to_cells(read)) == 8


def test_missing_columns(tmp_path):
  rows = [{k: v for k, v in row.items() if k not in ("tokens", "n_exp")}
          for row in rows_of(**ONE_RATE)]
  assert "lacks the columns n_exp, tokens" in refusal(tmp_path, rows)


def test_no_file(tmp_path):
  with pytest.raises(FieldError, match="cannot be read: No such file"):
    read_results(tmp_path / "nope.csv")


def test_no_rows(tmp_path):
  path = pathlib.Path(write(tmp_path, rows_of(**ONE_RATE)))
  path.write_text(path.read_text().splitlines()[0] + "\n")
  with pytest.raises(FieldError, match="has no rows"):
    read_results(path)


@pytest.mark.parametrize("loss,says", [
    (math.nan, "loss is nan"), (-1.0, "loss is -1"), ("", "loss is ''"),
    ("high", "loss is 'high'")])
def test_a_loss_that_is_none(tmp_path, loss, says):
  rows = rows_of(**ONE_RATE)
  rows[3]["loss"] = loss
  line = refusal(tmp_path, rows)
  assert says in line and f"line 5 (cell {rows[3]['cell']})" in line


def test_a_nan_cell_can_be_left_out(tmp_path):
  rows = rows_of(**ONE_RATE)
  rows[3]["loss"] = math.nan
  kept = read_results(write(tmp_path, rows), without=[rows[3]["cell"]])
  assert all(row["cell"] != rows[3]["cell"] for row in kept)


@pytest.mark.parametrize("change", [{"state": "running"}, {"state": "diverged"}, {"step": 200}])
def test_unfinished_runs(tmp_path, change):
  rows = rows_of(**ONE_RATE)
  rows[0] |= change
  line = refusal(tmp_path, rows)
  assert "is unfinished" in line and "--where=state=finished" in line


def test_where_leaves_unfinished_runs_out(tmp_path):
  rows = rows_of(**ONE_RATE)
  rows[0]["state"] = "running"
  assert len(read_results(write(tmp_path, rows), ["state=finished"])) == len(rows) - 1


@pytest.mark.parametrize("column,value", [("corpus", "gcide"), ("evaluation", "early")])
def test_mixed_data_sets(tmp_path, column, value):
  rows = rows_of(**ONE_RATE)
  rows[0][column] = value
  line = refusal(tmp_path, rows)
  assert f"mixes {column}" in line and f"--where={column}={value}" in line
  assert len(read_results(write(tmp_path, rows), [f"{column}={rows[1][column]}"])) == 7


def test_duplicated_rows(tmp_path):
  rows = rows_of(**ONE_RATE)
  assert "lines 4 and 10" in refusal(tmp_path, rows + [rows[2]])


def test_the_same_run_under_another_name_is_a_duplicate(tmp_path):
  rows = rows_of(**ONE_RATE)
  assert "same run twice" in refusal(tmp_path, rows + [rows[2] | {"cell": "copy"}])


def test_one_cell(tmp_path):
  assert "has one architecture" in refusal(tmp_path, rows_of(**ONE_RATE)[:1])


@pytest.mark.parametrize("where,says", [
    ("corpsu=sotu", "did you mean 'corpus'"), ("corpus", "must be COLUMN=VALUE"),
    ("corpus=gutenberg", "no row")])
def test_a_condition_that_cannot_be_met(tmp_path, where, says):
  assert says in refusal(tmp_path, rows_of(**ONE_RATE), where=[where])


def test_an_unknown_cell_to_leave_out(tmp_path):
  assert "no such cell" in refusal(tmp_path, rows_of(**ONE_RATE), without=["l9"])


def test_runs_that_differ_in_recipe_are_no_repeats(tmp_path):
  rows = rows_of(**ONE_RATE)
  rows = [row | {"weight_decay": 0.1} for row in rows]
  line = refusal(tmp_path, rows + [rows[0] | {"weight_decay": 0.2}])
  assert "differ in weight_decay" in line
