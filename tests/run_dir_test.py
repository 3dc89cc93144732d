"""The run directory: one owner, one identity, files that are whole, damage that is named."""

import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from etils import epath

from moe_jax import run_dir as run_dir_lib
from moe_jax.config import identity_hash
from moe_jax.errors import FieldError
from moe_jax.fields import override
from moe_jax.files import write_json, write_text
from moe_jax.grid import select
from moe_jax.run_dir import RunDir, RunDirBusy
from tests.experiment_files import BASE, ROOT


def test_a_run_lies_under_its_experiment(tmp_path, run_dir):
  assert os.fspath(run_dir.path) == str(tmp_path / "runs" / "tiny" / BASE)


def test_an_object_store_without_its_library_is_refused(cell, monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(FieldError, match=r"out='gs://b': needs gcsfs: pip install 'moe_jax\[gcs\]'"):
    RunDir.of("gs://b", cell)


# config.json


def test_a_claim_is_written_once(run_dir, cell):
  assert run_dir.read_config() is None
  run_dir.claim(cell)
  stored = json.loads((run_dir.path / "config.json").read_text())
  assert stored["cell"] == BASE
  assert stored["experiment"] == "tiny"
  assert stored["identity"] == identity_hash(cell.config)
  assert run_dir.read_config() == cell.config
  other_execution = select(cell.selector, {"execution.remat": "full"})[0]
  run_dir.claim(other_execution)
  assert run_dir.read_config() == cell.config


def test_a_claim_of_another_identity_is_refused_and_names_the_fields(run_dir, cell):
  run_dir.claim(cell)
  before = (run_dir.path / "config.json").read_text()
  other = select(cell.selector, {"train.steps": 30, "seed_data": 1})[0]
  with pytest.raises(FieldError) as caught:
    run_dir.claim(other)
  message = str(caught.value)
  assert "holds a run of another identity" in message
  assert "train.steps is 30 here and 20 there" in message
  assert "seed_data is 1 here and 0 there" in message
  assert "\n" not in message
  assert (run_dir.path / "config.json").read_text() == before


def test_check_identity_writes_nothing(run_dir, cell):
  assert not run_dir.check_identity(cell)
  assert not run_dir.path.exists()
  run_dir.claim(cell)
  assert run_dir.check_identity(cell)


@pytest.mark.parametrize("name, content, read", [
    ("config.json", "{\"config\": ", RunDir.read_config),
    ("config.json", "{}", RunDir.read_config),
    ("config.json", "[]", RunDir.read_config),
    ("config.json", '{"config": {"arch": 3}}', RunDir.read_config),
    ("status.json", "", RunDir.read_status),
    ("status.json", "{\"state\": \"runn", RunDir.read_status),
    ("status.json", "\udcff\udcfe", RunDir.read_status),
    ("status.json", "[1]", RunDir.read_status),
    ("status.json", '{"step": 3}', RunDir.read_status),
    ("metrics/0001-00000000.jsonl", '{"step": 1}\n{"ste', RunDir.read_metrics),
    ("metrics/0001-00000000.jsonl", '{"loss": 1}', RunDir.read_metrics),
    ("eval/heldout.json", "{", RunDir.read_evals),
])
def test_a_damaged_file_is_named_in_one_line(run_dir, name, content, read):
  file = run_dir.path / name
  file.parent.mkdir(parents=True)
  file.write_bytes(content.encode(errors="surrogateescape"))
  with pytest.raises(FieldError) as caught:
    read(run_dir)
  assert name in str(caught.value)
  assert "\n" not in str(caught.value)


# status.json and the lock

_HOLD = """
import sys, time
from etils import epath
from moe_jax.run_dir import RunDir
run_dir = RunDir(epath.Path(sys.argv[1]))
with run_dir.lock():
  run_dir.write_status({"state": "running", "step": 1})
  print("held", flush=True)
  time.sleep(60)
"""


@pytest.fixture
def holder(run_dir):
  """Another process that holds the run directory."""
  process = subprocess.Popen([sys.executable, "-c", _HOLD, os.fspath(run_dir.path)],
                             stdout=subprocess.PIPE, text=True, cwd=ROOT)
  assert process.stdout.readline() == "held\n"
  yield process
  process.kill()
  process.wait()


def test_the_second_process_is_refused_and_told_who_holds_it(run_dir, holder):
  with pytest.raises(RunDirBusy, match=f"in use by process {holder.pid} on "), run_dir.lock():
    pass
  assert run_dir.is_alive(run_dir.read_status())


def test_the_lock_of_a_killed_process_is_free(run_dir, holder):
  holder.send_signal(signal.SIGKILL)
  holder.wait()
  status = run_dir.read_status()
  assert status["state"] == run_dir_lib.RUNNING  # it could not say goodbye
  assert not run_dir.is_alive(status)
  with run_dir.lock():
    pass


def test_a_lock_is_free_after_its_context(run_dir):
  for _ in range(2):
    with run_dir.lock():
      pass


def test_a_silent_process_lives_while_it_holds_the_lock(run_dir, holder):
  status = {**run_dir.read_status(), "heartbeat": time.time() - 1e6}
  assert run_dir.is_alive(status)
  # its number was given to another process
  holder.kill()
  holder.wait()
  assert not run_dir.is_alive({**status, "pid": os.getpid()})


@pytest.mark.parametrize("age, alive", [(1.0, True), (1e6, False)])
def test_of_another_host_only_the_heartbeat_tells(run_dir, age, alive):
  status = {"state": "running", "host": "elsewhere.invalid", "pid": 1,
            "heartbeat": time.time() - age}
  assert run_dir.is_alive(status) is alive


@pytest.mark.parametrize("state", ["finished", "preempted", "diverged", "failed"])
def test_an_ended_run_is_not_alive(run_dir, state):
  run_dir.write_status({"state": state, "step": 1})
  assert not run_dir.is_alive(run_dir.read_status())


def test_a_status_carries_who_wrote_it_and_when(run_dir):
  assert run_dir.read_status() == {}
  before = time.time()
  run_dir.write_status({"state": "running", "step": 3})
  status = run_dir.read_status()
  assert (status["state"], status["step"], status["pid"]) == ("running", 3, os.getpid())
  assert before <= status["heartbeat"] <= time.time()


# metrics and evaluations


def _write_metrics(run_dir, attempt, first, losses):
  lines = [json.dumps({"step": first + i, "loss": loss}) for i, loss in enumerate(losses)]
  write_text(run_dir.metrics_file(attempt, first), "\n".join(lines) + "\n")


def test_where_two_attempts_have_a_step_the_later_counts(run_dir):
  assert run_dir.next_attempt() == 1
  assert run_dir.read_metrics() == []
  _write_metrics(run_dir, 1, 1, [5.0, 4.0, 3.0])
  _write_metrics(run_dir, 1, 4, [2.5])
  _write_metrics(run_dir, 2, 3, [2.9, 2.4, 2.0])
  _write_metrics(run_dir, 10, 5, [1.9])
  assert [(r["step"], r["loss"]) for r in run_dir.read_metrics()] == [
      (1, 5.0), (2, 4.0), (3, 2.9), (4, 2.4), (5, 1.9)]
  assert run_dir.next_attempt() == 11


def test_evaluations_are_read_by_name(run_dir):
  assert run_dir.read_evals() == {}
  run_dir.write_eval("heldout", {"loss": 2.0})
  run_dir.write_eval("domains", {"loss": {"a": 1.0}})
  assert run_dir.read_evals() == {"domains": {"loss": {"a": 1.0}}, "heldout": {"loss": 2.0}}


def test_a_root_that_is_a_file_is_refused(tmp_path, cell):
  (tmp_path / "file").write_text("")
  with pytest.raises(FieldError, match="is a file; it must be a directory"):
    RunDir.of(tmp_path / "file", cell)
  with pytest.raises(FieldError, match="lies below .*/file, a file; it must be a directory"):
    RunDir.of(tmp_path / "file" / "runs", cell)
  (tmp_path / "link").symlink_to(tmp_path / "gone")
  with pytest.raises(FieldError, match="is a broken link; it must be a directory"):
    RunDir.of(tmp_path / "link", cell)


@pytest.mark.parametrize("out", ["s3://bucket/runs", "file:///tmp/runs"])
def test_a_root_elsewhere_is_refused(cell, out):
  with pytest.raises(FieldError, match="must be a directory of this machine or gs://BUCKET/PATH"):
    RunDir.of(out, cell)


def test_a_name_that_no_file_system_takes_is_refused(tmp_path, cell):
  with pytest.raises(FieldError, match="has a name of 256 bytes; at most 255"):
    RunDir.of(tmp_path, dataclasses.replace(cell, name="c" * 256))
  RunDir.of(tmp_path, dataclasses.replace(cell, name="c" * 255))


def test_runs_that_begin_from_two_of_one_name_are_told_apart(tmp_path, cell):
  """The identity has the name of the run that another begins from, and not the path to it."""
  for root, rate in (("a", 1e-3), ("b", 2e-3)):
    config = override(cell.config, {"train.learning_rate": rate})
    RunDir(epath.Path(tmp_path / root / "old/run")).claim(dataclasses.replace(cell, config=config))
  ours, theirs, gone = (dataclasses.replace(cell, config=override(cell.config, {
      "train.init_from": f"{tmp_path}/{root}/old/run@20"})) for root in ("a", "b", "gone"))
  run_dir = RunDir.of(tmp_path, ours)
  began = RunDir(epath.Path(tmp_path / "a/old/run")).read_identity()
  run_dir.claim(ours, began_from={"run": "old/run", "step": 20, "identity": began,
                                  "checkpoint": "0"})
  run_dir.check_source(ours.config)
  run_dir.check_source(gone.config)  # on another machine there is nothing to compare with
  assert run_dir.check_identity(theirs)  # it may be evaluated, whatever lies there now
  for check in (lambda: run_dir.check_source(theirs.config), lambda: run_dir.claim(theirs)):
    with pytest.raises(FieldError, match=f"init_from='.*/b/old/run@20': .* began from another run "
                                         f"of that name, of identity {began}"):
      check()


@pytest.mark.parametrize("wrong", [{"pid": "x"}, {"pid": 10**20}, {"heartbeat": None}])
def test_a_status_of_wrong_types_is_damaged(run_dir, wrong):
  run_dir.write_status({"state": "running"})
  write_json(run_dir.path / "status.json", run_dir.read_status() | wrong)
  with pytest.raises(FieldError, match="is damaged"):
    run_dir.read_status()


@pytest.mark.parametrize("read", [RunDir.read_config, RunDir.read_identity,
                                  RunDir.read_branched_from, RunDir.read_began_from])
def test_a_configuration_that_is_none_is_damage_to_every_reader(run_dir, read):
  assert read(run_dir) is None
  write_json(run_dir.path / "config.json", ["neither"])
  with pytest.raises(FieldError, match=r"config\.json'?: is not a run configuration: list"):
    read(run_dir)


def test_a_directory_where_a_file_belongs_is_damage(run_dir):
  (run_dir.path / "config.json").mkdir(parents=True)
  with pytest.raises(FieldError, match="a directory where a file belongs"):
    run_dir.read_config()
