"""The agent and cells that train together: one process, and to each cell its own end."""

import itertools
import signal
import time

import pytest
from etils import epath

from launch.code import Code
from launch.host.agent import Agent, Pace
from launch.jobs import jobs_of, joint_command, read_launch, train_command
from launch.shares import deal
from launch.work import Work, from_text, to_text, work_of
from moe_jax.grid import select
from moe_jax.run_dir import is_gone
from tests.experiment_files import write, write_tiny
from tests.launch.agent_test import PATIENCE, _here, _run
from tests.launch.population_test import BRANCHES, ENVIRONMENT, SWEEP
from tests.launch.submitter import TRAINER


def _write(tmp_path, todo):
  file = epath.Path(todo.out) / todo.experiment / "_slices" / todo.name / "work.json"
  file.parent.mkdir(parents=True)
  file.write_text(to_text(todo))
  return file


def _work(tmp_path, behaviors, steps=20, **fields):
  """Tiny cells that train together; the behavior of each."""
  spec, out = write_tiny(tmp_path, seeds=len(behaviors), steps=steps), str(tmp_path / "runs")
  cells = {cell.name: ("python", str(TRAINER), ",".join(behaviors), f"--config={cell.selector}",
                       f"--out={out}") for cell in select(spec)}
  return Work("s0", "tiny", out, cells, backend="test", groups=(tuple(cells),), **fields)


def _train(tmp_path, todo, **arguments):
  file = _write(tmp_path, todo)
  assert from_text(file.read_text(), file) == todo
  return _here(Agent(todo, file.parent, "0-0", Pace(0.02, 0.02), **arguments))


def _launches(todo):
  return [read_launch(todo.run_dir(name)) for name in todo.cells]


def test_the_joint_command_differs_in_its_cells_alone():
  one, two = (("python", "-m", "moe_jax.train", f"--config=a=b:c.py:{cell}", "--out=o",
               "--config.seed_data=3") for cell in ("x", "y"))
  assert joint_command([one]) == one
  assert joint_command([one, two]) == (*one[:3], "--config=a=b:c.py:x,y", *one[4:])
  assert train_command(select("experiments/quickstart.py")[0], "o", [])[3].startswith("--config=")


def test_one_process_trains_all_and_each_ends_in_its_own_way(tmp_path, capfd):
  todo = _work(tmp_path, ["ok", "diverge", "ok"])
  assert _train(tmp_path, todo) == 0
  launches = _launches(todo)
  assert len({launch.pid for launch in launches}) == 1
  assert [launch.state for launch in launches] == ["finished", "diverged", "finished"]
  assert [launch.exit_code for launch in launches] == [0, 76, 0]
  assert [launch.attempt for launch in launches] == [1, 1, 1]
  assert [launch.error for launch in launches] == [None, "the loss is nan", None]


def test_one_that_breaks_the_process_does_not_hold_the_others(tmp_path, capfd):
  """Nobody can say whose fault it is; the last attempt, of each by itself, can."""
  todo = _work(tmp_path, ["ok", "broken", "ok"])
  assert _train(tmp_path, todo) == 0
  launches = _launches(todo)
  assert [launch.state for launch in launches] == ["finished", "failed", "finished"]
  assert [launch.failures for launch in launches] == [2, 3, 2]
  assert len({launch.pid for launch in launches}) == 3
  assert "given up after 3 failures" in capfd.readouterr().out


def test_one_that_crashes_once_goes_on_with_those_that_it_took_along(tmp_path, capfd):
  todo = _work(tmp_path, ["ok", "crash_once", "ok"])
  assert _train(tmp_path, todo) == 0
  first, *others = _launches(todo)
  assert (first.attempt, first.failures, first.state) == (1, 0, "finished")
  assert [(launch.attempt, launch.failures, launch.state) for launch in others] == [
      (2, 1, "finished")] * 2
  assert len({launch.pid for launch in others}) == 1


def test_what_another_process_holds_waits_until_the_others_have_ended(tmp_path):
  todo = _work(tmp_path, ["ok", "ok", "ok"])
  first, held, last = map(todo.run_dir, todo.cells)
  file = _write(tmp_path, todo)
  with held.lock():
    agent = _run(file)
    deadline = time.monotonic() + PATIENCE
    while any(run_dir.read_status().get("state") != "finished" for run_dir in (first, last)):
      assert time.monotonic() < deadline and agent.poll() is None
      time.sleep(0.02)
  output, _ = agent.communicate(timeout=PATIENCE)
  assert agent.returncode == 0, output
  launches = _launches(todo)
  assert [launch.state for launch in launches] == ["finished"] * 3
  assert launches[0].pid == launches[2].pid != launches[1].pid


def test_a_hung_process_counts_as_a_failure_of_those_that_had_not_ended(tmp_path, capfd):
  todo = _work(tmp_path, ["ok", "hang_once"])
  hours = itertools.count()
  run_dir = todo.run_dir(list(todo.cells)[1])

  def clock():  # stands still, but for when the run does
    status = run_dir.read_status()
    hung = (status.get("step"), status.get("attempt")) == (7, 1) and not is_gone(
        status["host"], status["pid"])
    return 3600.0 * next(hours) if hung else 0.0

  assert _train(tmp_path, todo, clock=clock) == 0
  assert "hung at step 20, 7: no step for" in capfd.readouterr().out
  assert [(launch.state, launch.failures) for launch in _launches(todo)] == [
      ("finished", 0), ("finished", 1)]


def test_told_to_stop_all_save_and_the_next_agent_goes_on_with_all(tmp_path):
  todo = _work(tmp_path, ["slow", "ok"], steps=40)
  file = _write(tmp_path, todo)
  agent = _run(file)
  run_dir, deadline = todo.run_dir(next(iter(todo.cells))), time.monotonic() + PATIENCE
  while run_dir.read_status().get("step", 0) < 3:
    assert time.monotonic() < deadline
    time.sleep(0.02)
  agent.send_signal(signal.SIGTERM)
  output, _ = agent.communicate(timeout=PATIENCE)
  assert agent.returncode == 75, output
  assert [(launch.state, launch.failures) for launch in _launches(todo)] == [("preempted", 0)] * 2
  file.write_text(file.read_text().replace('"slow,ok"', '"ok"'))
  assert _run(file).wait(PATIENCE) == 0
  launches = _launches(todo)
  assert [(launch.state, launch.attempt) for launch in launches] == [("finished", 2)] * 2
  assert len({launch.pid for launch in launches}) == 1


def _submitted(tmp_path, source):
  """The only share of a packed grid, as a submission would write it."""
  spec, out = write(tmp_path, source, "packed.py"), str(tmp_path / "runs")
  (share,) = deal(jobs_of(select(spec), out, []), 1)
  return work_of(share, Code("c", "a" * 64, spec, b""), out, "test")


def test_branches_train_together_after_their_trunks(tmp_path, capfd):
  todo = _submitted(tmp_path, BRANCHES)
  cells = {name: ("python", str(TRAINER), "ok", *command[3:])
           for name, command in todo.cells.items()}
  todo = Work(**{**vars(todo), "cells": cells})
  assert [len(group) for group in todo.groups] == [2, 2, 2]
  assert _train(tmp_path, todo) == 0
  launches = [[read_launch(todo.run_dir(name)) for name in group] for group in todo.groups]
  assert all(launch.state == "finished" for group in launches for launch in group)
  assert [len({launch.pid for launch in group}) for group in launches] == [1, 1, 1]
  begun = [group[0].started for group in launches]
  assert begun == sorted(begun)


@pytest.mark.slow
def test_a_sweep_really_trains_in_one_process(tmp_path):
  todo = _submitted(tmp_path, SWEEP)
  assert [len(group) for group in todo.groups] == [3, 1]
  agent = _run(_write(tmp_path, todo), **ENVIRONMENT)
  output, _ = agent.communicate(timeout=PATIENCE)
  assert agent.returncode == 0, output
  launches = [read_launch(todo.run_dir(name)) for group in todo.groups for name in group]
  assert [launch.state for launch in launches] == ["finished", "finished", "diverged", "finished"]
  assert launches[0].pid == launches[1].pid == launches[2].pid != launches[3].pid
