"""Bad results files: refused with one line that says what helps, or their rows listed as unused."""

import math
import pathlib

import pytest

from moe_jax.errors import FieldError
from moe_jax.laws.reduce import to_cells
from moe_jax.laws.table import UNUSED, read_results
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


def unused(tmp_path, rows, where=(), without=()) -> dict[str, str]:
  """Cell -> why it is not used; the report says the same."""
  read = read_results(write(tmp_path, rows), where, without)
  cells = to_cells(read)
  found = {row["cell"]: row[UNUSED] for row in read if UNUSED in row}
  assert {row["cell"] for row in cells.unused} == set(found)
  assert set(cells.names).isdisjoint(found) and len(cells) + len(found) == len(rows)
  for cell, why in found.items():
    assert f"NOT USED, {why}: {cell}" in cells.notes
  return found


@pytest.mark.parametrize("content,says", [
    (b"", "is empty"), (b"\n", "is empty"), (bytes(range(256)), "is not a text file"),
    (b"\x89PNG\r\n", "is not a text file"), (b"PK\x03\x04\x00\x00", "lacks the columns"),
    (b'{"a": 1}\n', "lacks the columns cell, state"), (b'a,b\n"x', "is not a CSV"),
])
def test_a_file_that_is_no_results_table(tmp_path, content, says):
  path = tmp_path / "results.csv"
  path.write_bytes(content)
  with pytest.raises(FieldError, match=says) as error:
    read_results(path)
  assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_a_directory(tmp_path):
  with pytest.raises(FieldError, match="cannot be read: Is a directory"):
    read_results(tmp_path)


def test_a_file_that_was_cut_off(tmp_path):
  path = pathlib.Path(write(tmp_path, rows_of(**ONE_RATE)))
  path.write_text(path.read_text()[:-60])
  with pytest.raises(FieldError, match="line 9 does not have the header's"):
    read_results(path)


@pytest.mark.parametrize("loss,says", [
    (-1.0, "loss is -1"), (0, "loss is 0"), ("high", "loss is 'high'")])
def test_a_loss_that_can_be_none(tmp_path, loss, says):
  rows = rows_of(**ONE_RATE)
  rows[3]["loss"] = loss
  line = refusal(tmp_path, rows)
  assert says in line and f"line 5 (cell {rows[3]['cell']})" in line


@pytest.mark.parametrize("column,value", [("n_exp", "many"), ("tokens", ""), ("n_total", "nan"),
                                          ("d_model", -64)])
def test_a_variable_that_is_no_number(tmp_path, column, value):
  rows = rows_of(**ONE_RATE)
  rows[3][column] = value
  assert f"{column} is " in refusal(tmp_path, rows)


@pytest.mark.parametrize("loss,says", [
    (math.nan, "loss is nan"), (math.inf, "loss is inf"), ("", "loss is missing")])
def test_a_run_without_a_loss_is_listed_and_not_used(tmp_path, loss, says):
  rows = rows_of(**ONE_RATE)
  rows[3]["loss"] = loss
  assert unused(tmp_path, rows) == {rows[3]["cell"]: says}


@pytest.mark.parametrize("change,says", [
    ({"state": "running"}, "unfinished: state 'running', step 500 of 500"),
    ({"state": "diverged", "step": 120, "loss": math.nan},
     "unfinished: state 'diverged', step 120 of 500"),
    ({"step": 200}, "unfinished: state 'finished', step 200 of 500"),
    ({"state": "failed", "step": "", "loss": "", "tokens": "", "corpus": ""},
     "unfinished: state 'failed', step unknown of 500")])
def test_unfinished_runs_are_listed_and_not_used(tmp_path, change, says):
  rows = rows_of(**ONE_RATE)
  rows[0] |= change
  assert unused(tmp_path, rows) == {rows[0]["cell"]: says}


def test_a_loss_that_has_seen_the_future_is_listed_and_not_used(tmp_path):
  rows = [row | {"causal": True} for row in rows_of(**ONE_RATE)]
  rows[2]["causal"] = False
  assert unused(tmp_path, rows) == {
      rows[2]["cell"]: "its router is not causal, so its loss uses future tokens"}


def test_no_finished_run_at_all(tmp_path):
  rows = [row | {"state": "running"} for row in rows_of(**ONE_RATE)]
  assert "has no usable run" in refusal(tmp_path, rows)


def test_what_is_left_out_on_purpose_is_listed_too(tmp_path):
  rows = rows_of(**ONE_RATE)
  rows[0]["corpus"], rows[1]["loss"] = "gcide", math.nan
  found = unused(tmp_path, rows, where=["corpus=sotu"], without=[rows[2]["cell"]])
  assert found == {rows[0]["cell"]: "left out by --where=corpus=sotu: corpus is gcide",
                   rows[1]["cell"]: "loss is nan",
                   rows[2]["cell"]: f"left out by --without={rows[2]['cell']}"}


@pytest.mark.parametrize("column,value", [("corpus", "gcide"), ("tokenizer", "bpe-512"),
                                          ("evaluation", "early"), ("data_fingerprint", "b")])
def test_mixed_data_sets(tmp_path, column, value):
  rows = [row | {"tokenizer": "bytes", "data_fingerprint": "a"} for row in rows_of(**ONE_RATE)]
  rows[0][column] = value
  line = refusal(tmp_path, rows)
  first = min(value, rows[1][column])
  assert f"mixes {column}" in line and f"--where={column}={first}" in line
  assert len(unused(tmp_path, rows, [f"{column}={rows[1][column]}"])) == 1


def test_duplicated_rows(tmp_path):
  rows = rows_of(**ONE_RATE)
  assert "lines 4 and 10" in refusal(tmp_path, rows + [rows[2]])


def test_the_same_run_under_another_name_is_a_duplicate(tmp_path):
  rows = rows_of(**ONE_RATE)
  assert "are the same run" in refusal(tmp_path, rows + [rows[2] | {"cell": "copy"}])


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


@pytest.mark.parametrize("column,value", [("init_from", "old/dense@7"), ("vocab_size", 512),
                                          ("tie_embeddings", True), ("qk_norm", "none")])
@pytest.mark.parametrize("seed", [0, 1])
def test_what_a_run_is_and_begins_from_is_recipe(tmp_path, column, value, seed):
  rows = [row | {"init_from": "", "vocab_size": 264, "tie_embeddings": False, "qk_norm": "head"}
          for row in rows_of(**ONE_RATE)]
  other = rows[0] | {column: value, "cell": "other", "seed_init": seed}
  line = refusal(tmp_path, rows + [other])
  assert f"have the same architecture but differ in {column} (" in line
  assert rows[0]["cell"] in line and "other" in line


@pytest.mark.parametrize("seed", [0, 1])
def test_what_is_no_column_is_recipe_too(tmp_path, seed):
  rows = [row | {"recipe_hash": "aaa"} for row in rows_of(**ONE_RATE)]
  line = refusal(tmp_path, rows + [rows[0] | {"recipe_hash": "bbb", "seed_init": seed}])
  assert "differ in a recipe setting that has no column (recipe_hash aaa, bbb)" in line
  assert "choose with --where=recipe_hash=aaa" in line
  rows[3]["recipe_hash"] = "bbb"  # between cells it is said
  notes = " ".join(to_cells(read_results(write(tmp_path, rows))).notes)
  assert "the recipe varies between cells in recipe_hash:" in notes
