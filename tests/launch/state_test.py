"""How a cell stands, told from files that real processes left in every state."""

import dataclasses
import json
import os
import subprocess
import sys
import time

import pytest

from launch import jobs as jobs_lib
from launch.jobs import Launch, write_launch
from launch.state import read_state, states_of, states_under
from moe_jax.arch.count import n_active, n_total
from moe_jax.config import identity_hash
from moe_jax.errors import FieldError
from moe_jax.files import write_json
from moe_jax.grid import select
from moe_jax.run_dir import RunDir
from tests.experiment_files import BASE, write_tiny


@pytest.fixture
def ended_pid():
  """The number of a process that has just ended."""
  process = subprocess.Popen([sys.executable, "-c", ""])
  process.wait()
  return process.pid


def _status(run_dir, state, age=0.0, **more):
  run_dir.write_status({"state": state, "step": 3, "steps": 20, "loss": 2.5,
                        "tokens_per_second": 10.0, "error": None})
  write_json(run_dir.path / "status.json", {
      **run_dir.read_status(), "heartbeat": time.time() - age, **more})


def _launch(run_dir, age=0.0, **more):
  fields = {"backend": "local", "command": ("x",), "attempt": 1, "pid": os.getpid(),
            "host": os.uname().nodename, "started": time.time() - age}
  write_launch(run_dir, Launch(**(fields | more)))


def test_a_cell_that_never_ran_is_pending_with_its_facts(run_dir, cell):
  row = read_state(run_dir, cell)
  assert (row.experiment, row.cell, row.state, row.step) == ("tiny", BASE, "pending", None)
  assert (row.n_total, row.n_active) == (n_total(cell.config.arch), n_active(cell.config.arch))
  assert row.steps == 20
  assert row.identity == identity_hash(cell.config)
  assert not run_dir.path.exists()


def test_the_trainers_word_is_the_row(run_dir, cell):
  run_dir.claim(cell)
  _status(run_dir, "preempted", age=50)
  row = read_state(run_dir, cell)
  assert (row.state, row.step, row.steps, row.loss, row.tokens_per_second) == (
      "preempted", 3, 20, 2.5, 10.0)
  assert 50 <= row.heartbeat_age < 100
  unasked = read_state(run_dir)  # all that a row says is in the directory
  assert dataclasses.replace(unasked, heartbeat_age=row.heartbeat_age) == row


def test_running_means_that_the_process_is_there(run_dir, ended_pid):
  _status(run_dir, "running")
  assert read_state(run_dir).state == "running"
  _status(run_dir, "running", pid=ended_pid)
  row = read_state(run_dir)
  assert row.state == "dead"
  assert f"process {ended_pid} on " in row.error
  _status(run_dir, "running", host="elsewhere.invalid")
  assert read_state(run_dir).state == "running"
  _status(run_dir, "running", host="elsewhere.invalid", age=1e5)
  assert read_state(run_dir).state == "dead"


def test_the_launcher_knows_how_a_killed_trainer_ended(run_dir, ended_pid):
  _launch(run_dir, pid=ended_pid, age=9, ended=time.time(), state="failed", exit_code=-9,
          error="killed by SIGKILL")
  _status(run_dir, "running", age=5, pid=ended_pid)
  row = read_state(run_dir)
  assert (row.state, row.step, row.error) == ("failed", 3, "killed by SIGKILL")


def test_a_launch_since_the_last_status_counts(run_dir, ended_pid):
  _status(run_dir, "preempted", age=50)
  _launch(run_dir)
  assert read_state(run_dir).state == jobs_lib.STARTING
  _launch(run_dir, pid=ended_pid)
  assert read_state(run_dir).state == "dead"
  _launch(run_dir, state="failed", exit_code=1, error="ImportError: x")
  assert read_state(run_dir).error == "ImportError: x"
  _launch(run_dir, age=99, state="failed", exit_code=1)  # the trainer has spoken since
  assert read_state(run_dir).state == "preempted"


def test_a_launcher_that_was_refused_does_not_hide_a_running_trainer(run_dir):
  _status(run_dir, "running", age=5)
  _launch(run_dir, state=jobs_lib.BUSY, exit_code=77, error="in use")
  assert read_state(run_dir).state == "running"


def test_a_run_of_another_identity_is_stale_and_names_the_fields(run_dir, cell):
  run_dir.claim(cell)
  _status(run_dir, "finished")
  other = select(cell.selector, {"train.steps": 30})[0]
  row = read_state(run_dir, other)
  assert (row.state, row.error) == ("stale identity", "train.steps is 30 here and 20 there")
  assert row.identity == identity_hash(other.config)
  assert read_state(run_dir, cell).state == "finished"


@pytest.mark.parametrize("name", ["config.json", "status.json", "launch.json"])
@pytest.mark.parametrize("content", ["", "{", "[1]", '{"x": 1}', '"text"', '{"pid": "1"}'])
def test_a_damaged_file_costs_only_its_row(run_dir, cell, name, content):
  run_dir.path.mkdir(parents=True)
  (run_dir.path / name).write_text(content)
  row = read_state(run_dir, cell)
  assert row.state == "damaged"
  assert name in row.error


def test_a_loss_that_is_not_a_number_is_not_known(run_dir):
  _status(run_dir, "diverged", loss=float("nan"), error="the loss\nis nan")
  row = read_state(run_dir)
  assert (row.loss, row.error) == (None, "the loss is nan")


def test_rows_of_an_experiment_are_its_cells_in_order(tmp_path):
  cells = select(write_tiny(tmp_path, seeds=12))
  RunDir.of(tmp_path / "runs", cells[10]).claim(cells[10])
  RunDir.of(tmp_path / "runs", cells[2]).claim(cells[2])
  assert [row.cell for row in states_of(tmp_path / "runs", cells)] == [
      cell.name for cell in cells]
  assert [row.cell for row in states_under(tmp_path / "runs")] == [f"{BASE}-s2", f"{BASE}-s10"]


def test_nothing_under_out_is_said_in_one_line(tmp_path):
  with pytest.raises(FieldError, match="holds no runs; --config=FILE lists"):
    states_under(tmp_path / "nowhere")


def test_a_process_of_another_user_is_not_gone(run_dir, monkeypatch):
  def deny(pid, number):
    assert number == 0
    raise PermissionError

  _status(run_dir, "running")
  monkeypatch.setattr(os, "kill", deny)
  assert read_state(run_dir).state == "running"


def test_the_hash_that_is_written_saves_a_look_and_decides_nothing_else(run_dir, cell):
  """Another version of this project may have made it of other fields."""
  run_dir.claim(cell)
  _status(run_dir, "finished")
  stored = json.loads((run_dir.path / "config.json").read_text())
  write_json(run_dir.path / "config.json", {**stored, "identity": "0" * 12})
  assert run_dir.read_identity() == "0" * 12
  assert read_state(run_dir, cell).state == "finished"
  stored["config"]["train"]["learning_rate"] = 0.5
  write_json(run_dir.path / "config.json", {**stored, "identity": "0" * 12})
  assert read_state(run_dir, cell).state == "stale identity"
