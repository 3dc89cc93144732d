"""A sitting does what fits into its time, tries again where memory ran out, and says the rest."""

import signal
import subprocess
import sys
import time
import zipfile

import pytest

from experiments.study import plan, units
from moe_jax.grid import Cell, select
from moe_jax.run_dir import RunDir
from moe_jax.study import kept
from tests.experiment_files import ROOT
from tests.study import planted

GRID = planted.grid()
CELLS = [Cell(GRID.name, f"planted.py:{name}", name, config)
         for name, config in zip(GRID.names, GRID.cells, strict=True)]


def sitting(tmp_path, monkeypatch, script, n=3, minutes=1.0, parallel=2):
  """One of n units, whose commands are what `script` says of a unit: a line for the shell."""
  found = units.units_of(CELLS[:n], lambda cell: units.is_done(cell, str(tmp_path)))

  def command_of(unit, out, population):
    del out, population
    line = script(unit)
    if line == "true":
      for cell in unit.cells:
        planted.write_run(tmp_path, cell.experiment, cell.name, cell.config,
                          None if unit.stage == "train" else 2.0)
    return ["sh", "-c", line]

  monkeypatch.setattr(units, "command_of", command_of)
  made = units.Sitting(found, str(tmp_path), parallel, 8, time.monotonic() + 60 * minutes)
  made.run()
  return made


def test_all_that_fits_is_done_and_not_again(tmp_path, monkeypatch):
  made = sitting(tmp_path, monkeypatch, lambda unit: "true")
  assert (len(made.done), made.left, made.failed) == (3, [], [])
  assert units.summary(made, 10.0)[0] == "3 units done, 0 left, 0 failed, in 10 s"
  assert not units.units_of(CELLS[:3], lambda cell: units.is_done(cell, str(tmp_path)))


def test_out_of_memory_is_tried_once_more_with_less(tmp_path, monkeypatch):
  def script(unit):
    if unit.overrides or unit.cells[0] != CELLS[0]:
      return "true"
    return "echo RESOURCE_EXHAUSTED: Out of memory; exit 1"

  made = sitting(tmp_path, monkeypatch, script)
  assert len(made.done) == 3 and not made.failed
  (again,) = [unit for unit in made.done if unit.overrides]
  assert again.overrides == ("--config.execution.population=1", "--config.execution.remat=full")


@pytest.mark.parametrize("stage", ["train", "evaluate"])
def test_only_training_that_ran_out_of_memory_itself_is_tried_again(tmp_path, monkeypatch, stage):
  """Not where an earlier attempt's memory is in the log, nor for lack of it in evaluation."""
  begun = []

  def script(unit):
    begun.append(unit.stage)
    if unit.stage != stage:
      return "true"
    return "exit 3" if stage == "train" else "echo RESOURCE_EXHAUSTED; exit 3"

  (unit,) = units.units_of(CELLS[:1], lambda cell: False)
  unit.log(tmp_path).parent.mkdir()
  unit.log(tmp_path).write_text("RESOURCE_EXHAUSTED: Out of memory\n")
  made = sitting(tmp_path, monkeypatch, script, n=1)
  assert begun.count(stage) == 1
  assert made.failed == [f"{unit.name}: {stage} ended with code 3: "
                         + ("no output" if stage == "train" else "RESOURCE_EXHAUSTED")]


def test_it_is_tried_again_once_whatever_was_passed_on(tmp_path, monkeypatch):
  begun = []

  def script(unit):
    unit.overrides = unit.overrides or ("--config.execution.remat=full",)
    begun.append(unit.overrides)
    return "echo RESOURCE_EXHAUSTED; exit 1"

  made = sitting(tmp_path, monkeypatch, script, n=1)
  assert [len(overrides) for overrides in begun] == [1, 3] and len(made.failed) == 1


def test_a_failure_is_told_by_its_last_line_and_stops_no_other(tmp_path, monkeypatch):
  made = sitting(tmp_path, monkeypatch, lambda unit: "true" if unit.cells[0] != CELLS[1]
                 else "echo error: no such text; exit 2")
  assert len(made.done) == 2
  assert made.failed == [f"{CELLS[1].name}: train ended with code 2: error: no such text"]
  assert len(made.logs) == 1 and made.logs[0].endswith("error: no such text\n")


def test_what_a_training_said_that_failed_in_part_is_packed_too(tmp_path, monkeypatch):
  monkeypatch.setattr(units, "is_trained", lambda cell, out: True)
  made = sitting(tmp_path, monkeypatch, lambda unit: f"echo {unit.stage} failed; exit 1", n=1)
  assert made.failed == [f"{CELLS[0].name}: evaluate ended with code 1: evaluate failed"]
  said = [line for line in made.logs[0].splitlines() if not line.startswith("====")]
  assert said == ["train failed", "evaluate failed"]


def test_a_damaged_run_fails_alone(tmp_path, monkeypatch):
  """A trainer that was killed may leave a status that is none."""
  def script(unit):
    if unit.cells[0] == CELLS[1]:
      planted.write_run(tmp_path, CELLS[1].experiment, CELLS[1].name, CELLS[1].config, None)
      (RunDir.of(tmp_path, CELLS[1]).path / "status.json").write_text("{")
      return "exit 1"
    return "true"

  made = sitting(tmp_path, monkeypatch, script)
  assert len(made.done) == 2
  assert made.failed == [f"{CELLS[1].name}: train ended with code 1: no output"]


STAND_IN = """
from experiments.study import sitting, units
from moe_jax import cli
from tests.study import planted
begun = []

def command_of(unit, out, population):
  begun.append(unit.name)
  if unit.name != begun[0]:
    return ["sh", "-c", "trap 'echo saved; exit 75' TERM; echo begun; while :; do sleep 0.1; done"]
  for cell in unit.cells:
    planted.write_run(out, cell.experiment, cell.name, cell.config, 2.0)
  return ["true"]

units.command_of = command_of
cli.run(sitting.main)
"""


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_machine_that_is_taken_away_has_saved_and_packed(tmp_path, number, code):
  packed, logs = tmp_path / "packed" / "results-1.zip", tmp_path / "runs" / "_sitting"
  process = subprocess.Popen(
      [sys.executable, "-c", STAND_IN, "--grids=rehearsal", f"--out={tmp_path / 'runs'}",
       f"--kept={tmp_path / 'none'}", f"--pack={packed.parent}"], cwd=ROOT)

  def said(word):
    return sum(word in file.read_text().splitlines() for file in logs.glob("*.txt"))

  def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
      assert process.poll() is None and time.monotonic() < deadline
      time.sleep(0.02)

  wait_for(lambda: packed.exists() and said("begun") == 3)  # packed when the first was done
  packed.unlink()
  process.send_signal(number)
  assert process.wait(60) == code
  assert said("saved") == 3
  assert len(zipfile.ZipFile(packed).namelist()) >= 3
  assert {file.name for file in packed.parent.iterdir()} == {packed.name, "sitting.txt"}
  assert "1 units done" in (packed.parent / "sitting.txt").read_text()


def test_time_is_kept(tmp_path, monkeypatch):
  """Who is at work when it is up gets SIGTERM; what would not end in time is begun alone, and only
  where the device would be idle."""
  began = time.monotonic()
  made = sitting(tmp_path, monkeypatch, lambda unit: "exec sleep 60", minutes=0.02)
  assert time.monotonic() - began < 10
  assert not made.done and len(made.left) == 3
  (tmp_path / "_sitting" / "seconds.json").write_text("[[1e6, 3.0]]")
  begun = []
  made = sitting(tmp_path, monkeypatch, lambda unit: begun.append(unit.name) or "exec sleep 60",
                 minutes=0.03)
  assert begun == [CELLS[0].name] and len(made.left) == 3


@pytest.mark.parametrize("seconds", ["[]", "[[1e6, 3.0]]"])  # all should end in time, and none
def test_what_was_begun_goes_on_first_however_long_it_takes(tmp_path, monkeypatch, seconds):
  (tmp_path / "_sitting").mkdir()
  (tmp_path / "_sitting" / "seconds.json").write_text(seconds)
  (RunDir.of(tmp_path, CELLS[2]).checkpoints / "5").mkdir(parents=True)
  begun = []
  sitting(tmp_path, monkeypatch, lambda unit: begun.append(unit.name) or "exec sleep 60",
          minutes=0.03, parallel=1)
  assert begun == [CELLS[2].name]


@pytest.mark.skipif(sys.platform != "linux", reason="it is Linux that tells them")
def test_no_trainer_outlives_a_sitting_that_was_killed(tmp_path):
  """It would hold its run's directory and the device, and the next sitting would fail on it."""
  logs = tmp_path / "runs" / "_sitting"
  process = subprocess.Popen(
      [sys.executable, "-c", STAND_IN, "--grids=rehearsal", f"--out={tmp_path / 'runs'}",
       f"--kept={tmp_path / 'none'}"], cwd=ROOT)
  deadline = time.monotonic() + 60

  def said(word):
    assert time.monotonic() < deadline
    return sum(word in file.read_text().splitlines() for file in logs.glob("*.txt"))

  try:
    while said("begun") < 3:
      assert process.poll() is None
      time.sleep(0.02)
  finally:
    process.kill()
    process.wait()
  while said("saved") < 3:
    time.sleep(0.02)


def test_branches_of_a_trunk_that_diverged_are_not_trained_again(tmp_path):
  cells = select(str(plan.FOLDER / "small.py"))
  branch = next(cell for cell in cells if cell.config.train.branch_run)
  trunk = next(cell for cell in cells if cell.name == branch.config.train.branch_run)
  planted.write_run(tmp_path, trunk.experiment, trunk.name, trunk.config, None)
  run, at = RunDir.of(tmp_path, trunk), branch.config.train.branch_step
  for state, step, done in (("running", at - 1, False), ("diverged", at - 1, True),
                            ("diverged", at, False)):  # the last has a checkpoint to begin with
    run.write_status(run.read_status() | {"state": state, "step": step})
    assert units.is_done(branch, str(tmp_path)) == done
  run.write_status(run.read_status() | {"state": "diverged", "step": at - 1})
  grid = plan.grids()[branch.experiment]
  row = next(row for _, row in kept.table(tmp_path, grid) if row["cell"] == branch.name)
  assert row["state"] == kept.NOT_RUN and row["error"] == f"its trunk {trunk.name} diverged"


def test_what_failed_is_told_where_only_the_trunk_was_trained(tmp_path, monkeypatch):
  cells = select(str(plan.FOLDER / "small.py"))
  (unit, *_) = units.units_of(cells, lambda cell: False)
  trunk = next(cell for cell in unit.cells if not cell.config.train.decay_fraction)
  planted.write_run(tmp_path, trunk.experiment, trunk.name, trunk.config, None)
  monkeypatch.setattr(units, "command_of", lambda unit, *_: [
      "sh", "-c", f"echo {unit.stage} failed; exit 1"])
  made = units.Sitting([unit], str(tmp_path), 1, 8, time.monotonic() + 60)
  made.run()
  assert made.failed == [f"{unit.name}: train ended with code 1: train failed"]
