"""What is kept of runs: small, merged without loss, the same however often."""

import json
import zipfile

import pytest
from etils import epath

from moe_jax.errors import FieldError
from moe_jax.evaluate.results import write_csv
from moe_jax.fields import override
from moe_jax.files import write_text
from moe_jax.laws.table import read_results
from moe_jax.run_dir import RunDir
from moe_jax.study import kept
from tests.study import planted

GRID = planted.grid()
FIRST, SECOND, *_ = GRID.names


def write(folder, number, loss=2.0, **changes):
  planted.write_run(folder, GRID.name, GRID.names[number], GRID.cells[number], loss, **changes)


def content(folder):
  return {str(file.relative_to(folder)): file.read_bytes()
          for file in folder.rglob("*") if file.is_file()}


def rows_of(folder):
  return {row["cell"]: row for _, row in kept.table(folder, GRID)}


def test_two_sittings_in_any_order_and_twice(tmp_path):
  write(tmp_path / "one", 0)
  write(tmp_path / "one", 1, None, state="preempted")
  write(tmp_path / "two", 1, 2.1)
  write(tmp_path / "two", 2, None, state="diverged", error="loss is nan\nat step 7")
  for order, name in ((("one", "two"), "a"), (("two", "one", "two", "one"), "b")):
    for sitting in order:
      assert kept.keep(tmp_path / sitting, tmp_path / name, [GRID.name])[2] == []
  once, again = content(tmp_path / "a"), content(tmp_path / "b")
  assert once == again
  rows = rows_of(tmp_path / "a")
  assert list(rows) == list(GRID.names)
  assert [rows[name]["state"] for name in GRID.names[:4]] == [
      "finished", "finished", "diverged", "not run"]
  assert rows[SECOND]["loss"] == 2.1
  assert rows[GRID.names[2]]["error"] == "loss is nan at step 7"


def test_a_table_without_a_result_is_read(tmp_path):
  write(tmp_path, 0, None, state="failed", error="gone")
  write_csv(epath.Path(tmp_path) / "results.csv", [row for _, row in kept.table(tmp_path, GRID)])
  with pytest.raises(FieldError, match=r"has no usable run, e.g. .*'failed' \(gone\)"):
    read_results(tmp_path / "results.csv")


def test_a_result_that_is_there_stays(tmp_path):
  write(tmp_path / "one", 0, 2.0)
  write(tmp_path / "two", 0, 3.0)
  write(tmp_path / "three", 0, None, state="failed", error="gone")
  for sitting in ("one", "two", "three"):
    kept.keep(tmp_path / sitting, tmp_path / "to", [GRID.name])
  assert rows_of(tmp_path / "to")[FIRST]["loss"] == 2.0


def test_metrics_are_thinned_and_hosts_left_out(tmp_path):
  write(tmp_path / "one", 0, records=1001)
  kept.keep(tmp_path / "one", tmp_path / "to", [GRID.name])
  run = RunDir(epath.Path(tmp_path / "to") / GRID.name / FIRST)
  steps = [record["step"] for record in run.read_metrics()]
  assert (len(steps), steps[0], steps[-1]) == (200, 1, 1001)
  assert run.read_metrics()[0]["loss"] == 0.25 and run.read_metrics()[-1]["loss"] == 0.00099602
  assert run.read_status()["host"] == ""
  before = content(tmp_path / "to")
  kept.keep(tmp_path / "to", tmp_path / "further", [GRID.name])
  assert content(tmp_path / "further") == before


def test_what_training_dropped_after_warm_up(tmp_path):
  """A branch's trunk is part of its training."""
  write(tmp_path, 0, records=100, drop_rate=0.01)
  assert rows_of(tmp_path)[FIRST]["training_drop_rate"] == pytest.approx(0.01)
  config = GRID.cells[0]
  branch = override(config, {"train.branch_from": f"{FIRST}@60"})
  planted.write_run(tmp_path, GRID.name, "branch", branch, 2.0, records=200, drop_rate=0.002)
  run = RunDir(epath.Path(tmp_path) / GRID.name / "branch")
  assert kept.training_drop_rate(run, branch) == pytest.approx(
      (40 * 0.01 + 200 * 0.002) / 240)  # warm-up is 20 steps
  trunk = RunDir(epath.Path(tmp_path) / GRID.name / FIRST)
  trunk.metrics_file(1, 1).unlink()
  assert kept.training_drop_rate(run, branch) is None
  assert rows_of(tmp_path)[FIRST]["training_drop_rate"] is None


@pytest.mark.parametrize("of_trunk, of_branch", [(1, 10), (4, 1)])
def test_how_often_a_run_logs_does_not_decide_what_it_dropped(tmp_path, of_trunk, of_branch):
  config = GRID.cells[0]
  branch = override(config, {"train.branch_from": f"{FIRST}@60"})
  for name, cell, steps, rate in ((FIRST, config, range(of_trunk, 61, of_trunk), 0.01),
                                  ("branch", branch, range(60 + of_branch, 201, of_branch), 0.0)):
    planted.write_run(tmp_path, GRID.name, name, cell, 2.0)
    run = RunDir(epath.Path(tmp_path) / GRID.name / name)
    write_text(run.metrics_file(1, 1), "".join(
        json.dumps({"step": step, "drop_rate": rate}) + "\n" for step in steps))
  assert kept.training_drop_rate(run, branch) == pytest.approx(40 * 0.01 / 180)


def test_runs_of_another_identity_are_refused_and_listed(tmp_path):
  write(tmp_path / "one", 0)
  planted.write_run(tmp_path / "two", GRID.name, FIRST, GRID.cells[1], 2.0)
  planted.write_run(tmp_path / "one", GRID.name, "l1-d8", GRID.cells[0], 2.0)
  kept.keep(tmp_path / "one", tmp_path / "to", [GRID.name])
  (line,) = kept.keep(tmp_path / "two", tmp_path / "to", [GRID.name])[2]
  assert FIRST in line and "is not the run archived as" in line
  assert rows_of(tmp_path / "to")["l1-d8"]["state"] == "not of the grid"
  with pytest.raises(FieldError, match="does not exist"):
    kept.keep(tmp_path / "none", tmp_path / "to", [GRID.name])


def test_a_run_of_another_text_is_refused_and_listed(tmp_path):
  """An identity names its corpus, whose text may differ between machines."""
  write(tmp_path / "one", 0, 2.0)
  write(tmp_path / "two", 0, 3.0, text="other")
  write(tmp_path / "three", 0, None, state="preempted")  # of no text that is known
  kept.keep(tmp_path / "one", tmp_path / "to", [GRID.name])
  written, same, (line,) = kept.keep(tmp_path / "two", tmp_path / "to", [GRID.name])
  assert (written, same) == (0, 0) and "\n" not in line
  assert line.startswith(f"planted/{FIRST}: not archived: ")
  assert line.endswith("data_fingerprint other and planted")
  assert kept.keep(tmp_path / "three", tmp_path / "to", [GRID.name]) == (0, 1, [])
  assert rows_of(tmp_path / "to")[FIRST]["loss"] == 2.0


def test_a_table_joins_runs_of_one_text(tmp_path):
  write(tmp_path, 0)
  write(tmp_path, 2, None, state="diverged")
  assert len(rows_of(tmp_path)) == len(GRID.names)
  write(tmp_path, 1, text="other")
  with pytest.raises(FieldError, match=f"{FIRST} and {SECOND} were evaluated on two texts "
                     "named 'sotu': data_fingerprint planted and other") as refused:
    kept.table(tmp_path, GRID)
  assert "\n" not in str(refused.value)


def test_packed_in_parts_and_taken_up(tmp_path):
  for number in range(6):
    write(tmp_path / "one", number, records=150)
  kept.keep(tmp_path / "one", tmp_path / "to", [GRID.name])
  files = kept.pack(tmp_path / "to", tmp_path / "packed", 9_000)
  assert 2 <= len(files) <= 6 and all(file.stat().length <= 9_000 for file in files)
  for file in files:
    kept.keep(file, tmp_path / "back", [GRID.name])
  assert content(tmp_path / "back") == content(tmp_path / "to")
  (whole,) = kept.pack(tmp_path / "to", tmp_path / "whole")
  kept.keep(whole, tmp_path / "from_one", [GRID.name])
  assert content(tmp_path / "from_one") == content(tmp_path / "to")
  with pytest.raises(FieldError, match="part_mb=0.001: planted/.* alone takes .* MB"):
    kept.pack(tmp_path / "to", tmp_path / "none", 1_000)
  assert not (tmp_path / "none").exists()
  (tmp_path / "cut.zip").write_bytes(files[0].read_bytes()[:500])
  with pytest.raises(FieldError, match="is not a valid .zip"):
    kept.keep(tmp_path / "cut.zip", tmp_path / "back", [GRID.name])
  assert zipfile.ZipFile(files[0]).testzip() is None
