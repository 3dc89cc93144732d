"""From lm_eval's answer to eval/, results.csv and the table, without lm_eval."""

import importlib.util

import pytest

from moe_jax.config import identity_hash
from moe_jax.errors import FieldError
from moe_jax.evaluate import results
from moe_jax.evaluate.harness import catalogue, run
from tests.evaluate.conftest import cells_of
from tests.evaluate.results_test import leave

ANSWER = {
    "results": {"one": {"alias": "one", "acc,none": 0.25, "acc_stderr,none": 0.1,
                        "exact_match,strict": 0.5, "exact_match_stderr,strict": "N/A"},
                "part": {"alias": " - part", "acc,none": 0.75},
                "group": {"alias": "group", " ": " "}},
    "group_subtasks": {"group": ["part", "one"], "one": []},
    "n-samples": {"one": {"original": 9, "effective": 8}, "part": {"original": 2, "effective": 2}}}


def test_metrics_get_names_of_columns():
  told = run.describe("one", ANSWER)
  assert told["columns"] == {"one.acc": 0.25, "one.acc_se": 0.1, "one.exact_match.strict": 0.5}
  assert told["questions"] == 8 and told["task"] == "one"
  assert told["metrics"]["one"]["acc"] == 0.25


def test_a_group_without_a_metric_of_its_own_has_those_of_its_tasks():
  told = run.describe("group", ANSWER)
  assert told["columns"] == {"part.acc": 0.75, "one.acc": 0.25, "one.acc_se": 0.1,
                             "one.exact_match.strict": 0.5}
  assert told["questions"] == 10
  own = ANSWER | {"results": ANSWER["results"] | {"group": {"acc,none": 0.5}}}
  assert run.describe("group", own)["columns"] == {"group.acc": 0.5}


def test_a_tag_takes_no_other_tasks_results():
  told = run.describe("tag", ANSWER, ["tag", "one"])
  assert told["columns"] == {"part.acc": 0.75} and told["questions"] == 2
  assert run.describe("tag", ANSWER, ["tag", "group"])["columns"] == {}


def test_results_have_the_columns_of_the_same_checkpoint(tmp_path, capsys):
  (cell,) = cells_of(seeds=1)
  run_dir = leave(tmp_path, cell)
  about = {"step": 4, "identity": identity_hash(cell.config)}
  run_dir.write_eval("one", about | run.describe("one", ANSWER))
  run_dir.write_eval("old", about | {"step": 2, "task": "old", "columns": {"old.acc": 1.0}})
  (row,) = results.rows_of(run_dir)
  assert row["evaluation"] == "heldout" and row["loss"] == 2.5
  assert (row["one.acc"], row["one.acc_se"]) == (0.25, 0.1) and "old.acc" not in row
  run.show(["one"], [row, row | {"cell": "other", "one.acc": None}])
  printed = capsys.readouterr().out
  assert "one.acc " in printed and "0.25 ± 0.1" in printed and "one.acc_se" not in printed


def test_without_the_harness_one_line_says_how_to_install_it(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(FieldError) as error:
    catalogue.parse_tasks("heldout_cloze")
  assert str(error.value) == ("tasks='heldout_cloze': needs lm-evaluation-harness: pip install "
                              "'moe_jax[eval]'")


@pytest.mark.parametrize("text, message", [
    ("", "must be names of tasks"), ("a,,b", "must be names of tasks"),
    ("a/b.yaml", "must be names of tasks"), ("routing", "is the name of another evaluation"),
    ("python-heldout", "is the name of another evaluation")])
def test_names_that_cannot_be_are_refused(text, message):
  with pytest.raises(FieldError, match=message):
    catalogue.parse_tasks(text)


def test_names_are_taken_once(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
  assert catalogue.parse_tasks("b, a,b") == ("b", "a")


def test_an_error_is_told_with_its_cause():
  """What lm_eval raises says little; what it was raised from says where to look."""
  error = ValueError("An error occurred while generating\nthe dataset")
  error.__cause__ = KeyError("x")
  assert catalogue.one_line(error) == (
      "An error occurred while generating the dataset: KeyError 'x'")
  assert catalogue.one_line(StopIteration()) == "it has no documents"
