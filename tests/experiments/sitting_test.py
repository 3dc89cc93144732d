"""A sitting does what fits into its time, tries again where memory ran out, and says the rest."""

import signal
import subprocess
import sys
import time
import zipfile

import pytest

from experiments.study import units
from moe_jax.grid import Cell
from moe_jax.run_dir import RunDir
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
                         + ("no word" if stage == "train" else "RESOURCE_EXHAUSTED")]


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
  assert made.failed == [f"{CELLS[1].name}: train ended with code 1: no word"]


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
    return sum(word in file.read_text() for file in logs.glob("*.txt"))

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
  """Who is at work when it is up gets SIGTERM; what would not end in time is not begun."""
  began = time.monotonic()
  made = sitting(tmp_path, monkeypatch, lambda unit: "exec sleep 60", minutes=0.02)
  assert time.monotonic() - began < 10
  assert not made.done and len(made.left) == 3
  (tmp_path / "_sitting" / "seconds.json").write_text("[[1e6, 3.0]]")
  made = sitting(tmp_path, monkeypatch, lambda unit: pytest.fail("was begun"), minutes=0.03)
  assert len(made.left) == 3
