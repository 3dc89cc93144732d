"""The local backend with real processes: what runs, what is skipped, what a crash costs."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest
from etils import epath

from launch.backends import local
from launch.jobs import read_launch
from launch.state import states_of
from moe_jax.errors import FieldError
from moe_jax.grid import select
from moe_jax.run_dir import RunDir
from tests.experiment_files import BASE, ROOT, write_tiny
from tests.launch import submitter
from tests.launch.waiting import wait_until

PATIENCE = 60  # seconds a loaded machine may take for what takes one


def _submit(spec, out, behaviors, parallel=2):
  return local.submit(submitter.jobs_of(spec, out, behaviors), parallel)


def _states(spec, out):
  return [row.state for row in states_of(out, select(spec))]


def _attempts(spec, out):
  return [read_launch(job.run_dir).attempt
          for job in submitter.jobs_of(spec, out, ["ok"] * len(select(spec)))]


def test_all_cells_are_trained_and_then_skipped(tmp_path, capsys):
  spec, out = write_tiny(tmp_path, seeds=3), tmp_path / "runs"
  assert _submit(spec, out, ["ok"] * 3) == 0
  assert _states(spec, out) == ["finished"] * 3
  assert "all 3 cells are finished" in capsys.readouterr().out
  assert _submit(spec, out, ["ok"] * 3) == 0
  assert "3 already finished, 0 to run" in capsys.readouterr().out
  assert _attempts(spec, out) == [1, 1, 1]


def test_never_more_than_parallel_run_at_a_time(tmp_path):
  spec, out = write_tiny(tmp_path, seeds=5, steps=4), tmp_path / "runs"
  assert _submit(spec, out, ["ok"] * 5, parallel=2) == 0
  launches = [read_launch(job.run_dir) for job in submitter.jobs_of(spec, out, ["ok"] * 5)]
  for launch in launches:
    together = [other for other in launches
                if other.started <= launch.started < other.ended]
    assert len(together) <= 2


def test_a_failing_cell_does_not_stop_the_others(tmp_path, capsys):
  spec, out = write_tiny(tmp_path, seeds=4), tmp_path / "runs"
  assert _submit(spec, out, ["broken", "diverge", "liar", "ok"]) == 1
  assert _states(spec, out) == ["failed", "diverged", "failed", "finished"]
  assert _attempts(spec, out) == [1, 1, 1, 1]
  end = capsys.readouterr().out.partition("1 of 4 cells are finished; unfinished:")[2]
  assert f"{BASE}: failed: ImportError: no module named 'nonsense'" in end
  assert f"{BASE}-s1: diverged at step 7 of 20: the loss is nan" in end
  assert f"{BASE}-s2: failed: exited without an error, but is not" in end
  assert f"log: {out}/tiny/{BASE}/log.txt" in end
  assert f"{BASE}-s3" not in end


@pytest.mark.parametrize("behavior, error", [
    ("crash_once", "RuntimeError: step 7 is cursed"), ("killed_once", "killed by SIGKILL")])
def test_a_crash_that_got_further_is_tried_once_more(tmp_path, capsys, behavior, error):
  spec, out = write_tiny(tmp_path, seeds=1), tmp_path / "runs"
  assert _submit(spec, out, [behavior]) == 0
  assert _attempts(spec, out) == [2]
  assert f"failed at step 7 of 20: {error}" in capsys.readouterr().out
  metrics = sorted(file.name for file in (out / "tiny" / BASE / "metrics").iterdir())
  assert metrics == ["0001-00000000.jsonl", "0002-00000005.jsonl"]  # it went on from step 5


def test_a_crash_is_not_tried_for_ever(tmp_path):
  spec, out = write_tiny(tmp_path, seeds=1), tmp_path / "runs"
  assert _submit(spec, out, ["crash"]) == 1
  assert _attempts(spec, out) == [2]
  assert _submit(spec, out, ["crash"]) == 1  # no step gained: no second try
  assert _attempts(spec, out) == [3]
  assert _submit(spec, out, ["ok"]) == 0  # repaired


def test_a_launch_tries_a_cell_twice_at_most(tmp_path):
  spec, out = write_tiny(tmp_path, seeds=1, steps=40), tmp_path / "runs"
  assert _submit(spec, out, ["crawl"]) == 1
  assert _attempts(spec, out) == [2]
  assert _submit(spec, out, ["crawl"]) == 1
  assert _attempts(spec, out) == [4]


def test_the_log_keeps_every_attempt_and_its_command(tmp_path):
  spec, out = write_tiny(tmp_path, seeds=1), tmp_path / "runs"
  _submit(spec, out, ["crash_once"])
  log = (out / "tiny" / BASE / "log.txt").read_text()
  assert log.count("==== ") == 2
  assert "launch 1: " in log
  assert "launch 2: " in log
  assert f"--config={spec}:{BASE}" in log
  assert log.count("RuntimeError: step 7 is cursed") == 1


def test_launch_json_tells_what_ran_and_how_it_ended(tmp_path):
  spec, out = write_tiny(tmp_path, seeds=1), tmp_path / "runs"
  _submit(spec, out, ["diverge"])
  launch = json.loads((out / "tiny" / BASE / "launch.json").read_text())
  assert launch["backend"] == "local"
  assert launch["command"][-2:] == [f"--config={spec}:{BASE}", f"--out={out}"]
  assert (launch["exit_code"], launch["state"]) == (76, "diverged")
  assert launch["error"] == "the loss is nan"
  assert launch["started"] < launch["ended"]


def test_a_run_directory_that_cannot_be_made_costs_only_its_cell(tmp_path, capsys):
  spec, out = write_tiny(tmp_path), tmp_path / "runs"
  (out / "tiny").mkdir(parents=True)
  (out / "tiny" / BASE).touch()
  assert _submit(spec, out, ["ok", "ok"]) == 1
  assert f"{BASE}: not started: " in capsys.readouterr().out
  assert (out / "tiny" / f"{BASE}-s1" / "status.json").exists()


def test_damaged_status_and_launch_files_do_not_stop_a_launch(tmp_path):
  spec, out = write_tiny(tmp_path, seeds=1), tmp_path / "runs"
  folder = out / "tiny" / BASE
  folder.mkdir(parents=True)
  (folder / "status.json").write_text('{"state": "fini')
  (folder / "launch.json").write_text("")
  assert _submit(spec, out, ["ok"]) == 0


def test_a_finished_run_of_another_identity_is_not_taken_for_this_one(tmp_path, capsys):
  spec, out = write_tiny(tmp_path, seeds=1), tmp_path / "runs"
  assert _submit(spec, out, ["ok"]) == 0
  write_tiny(tmp_path, seeds=1, steps=300)
  assert _submit(spec, out, ["ok"]) == 1  # the trainer refuses
  assert f"{BASE}: refused: --out=" in capsys.readouterr().out
  assert _states(spec, out) == ["stale identity"]


def test_object_stores_are_refused_by_name(tmp_path):
  (job,) = submitter.jobs_of(write_tiny(tmp_path, seeds=1), tmp_path, ["ok"])
  remote = dataclasses.replace(job, run_dir=RunDir(epath.Path("gs://bucket/runs/tiny/x")))
  with pytest.raises(FieldError, match="out='gs://.*must be a local path"):
    local.submit([remote], 1)


def test_a_dry_run_shows_exactly_what_would_run(tmp_path):
  folder = tmp_path / "a b; $(c)"
  folder.mkdir()
  spec, out = write_tiny(folder), tmp_path / "runs"
  jobs = submitter.jobs_of(spec, out, ["ok", "ok"])
  assert _submit(f"{spec}:{BASE}", out, ["ok"]) == 0
  finished, line = local.dry_run(jobs)
  assert finished == f"# {BASE} is finished"
  assert subprocess.run(["bash", "-c", f"printf '%s\\n' {line}"], text=True,
                        capture_output=True).stdout.splitlines() == list(jobs[1].command)


# Signals, to a launcher in a process of its own


@pytest.fixture
def launcher(tmp_path):
  """Starts launchers."""
  def start(spec, *behaviors, parallel=2, stdout=subprocess.PIPE, **popen):
    return subprocess.Popen(
        [sys.executable, submitter.__file__, spec, str(tmp_path / "runs"), str(parallel),
         *behaviors],
        stdout=stdout, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
        **popen)

  return start


def _steps(spec, out):
  return [row.step or 0 for row in states_of(out, select(spec))]


@pytest.mark.parametrize("number, code", [
    (signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_saves_every_cell_and_the_next_launch_goes_on(tmp_path, launcher, number,
                                                               code):
  spec, out = write_tiny(tmp_path, seeds=3, steps=200), tmp_path / "runs"
  process = launcher(spec, "slow", "slow", "slow")
  wait_until(lambda: min(_steps(spec, out)[:2]) > 2, PATIENCE)
  process.send_signal(number)
  output, _ = process.communicate(timeout=PATIENCE)
  assert process.returncode == code
  assert _states(spec, out) == ["preempted", "preempted", "pending"]
  assert "0 of 3 cells are finished" in output
  assert "1 not started" in output
  assert f"to resume: {sys.executable} " in output.splitlines()[-1]
  saved = [int((out / "tiny" / name / "checkpoint").read_text())
           for name in (BASE, f"{BASE}-s1")]
  assert saved == _steps(spec, out)[:2]
  assert _submit(spec, out, ["ok"] * 3) == 0
  for name, step in zip((BASE, f"{BASE}-s1"), saved, strict=True):
    assert (out / "tiny" / name / "metrics" / f"0002-{step:08d}.jsonl").exists()


def test_ctrl_c_in_the_terminal_reaches_the_launcher_alone(tmp_path, launcher):
  # a terminal signals the whole foreground group: the children must not be in it
  spec, out = write_tiny(tmp_path, seeds=1, steps=200), tmp_path / "runs"
  process = launcher(spec, "deaf", start_new_session=True)
  wait_until(lambda: _steps(spec, out)[0] > 2, PATIENCE)
  os.killpg(process.pid, signal.SIGINT)
  seen = _steps(spec, out)[0]
  wait_until(lambda: _steps(spec, out)[0] > seen + 3, PATIENCE)  # deaf to the SIGTERM, and alive
  assert process.poll() is None
  os.killpg(process.pid, signal.SIGINT)  # the second one kills
  process.communicate(timeout=PATIENCE)
  assert process.returncode == 130
  (row,) = states_of(out, select(spec))
  assert (row.state, row.error) == ("stopped", "killed by SIGKILL")


def test_the_children_save_even_if_nobody_reads_the_launcher(tmp_path, launcher):
  # `launch.submit | tee log`: Ctrl-C ends tee first
  spec, out = write_tiny(tmp_path, seeds=1, steps=200), tmp_path / "runs"
  reader, writer = os.pipe()
  process = launcher(spec, "slow", stdout=writer)
  os.close(writer)
  wait_until(lambda: _steps(spec, out)[0] > 2, PATIENCE)
  os.close(reader)
  process.send_signal(signal.SIGINT)
  assert process.wait(timeout=PATIENCE) == 130
  assert _states(spec, out) == ["preempted"]


def test_a_killed_launcher_leaves_children_that_the_next_one_sees(tmp_path, launcher):
  spec, out = write_tiny(tmp_path, steps=400), tmp_path / "runs"
  process = launcher(spec, "slow", "slow", parallel=1)
  wait_until(lambda: _steps(spec, out)[0] > 2, PATIENCE)
  process.kill()
  process.wait(PATIENCE)
  child = json.loads((out / "tiny" / BASE / "status.json").read_text())["pid"]
  assert _states(spec, out) == ["running", "pending"]
  second = launcher(spec, "ok", "ok")
  output, _ = second.communicate(timeout=PATIENCE)
  assert second.returncode == 1
  assert f"{BASE}: not started: {out}/tiny/{BASE} is in use by process {child} on" in output
  assert _states(spec, out) == ["running", "finished"]
  os.kill(child, signal.SIGKILL)
  wait_until(lambda: _states(spec, out)[0] == "dead", PATIENCE)
  assert _submit(spec, out, ["ok", "ok"]) == 0


def test_a_launcher_on_a_terminal_draws_the_running_cells(tmp_path, launcher, monkeypatch):
  spec, out = write_tiny(tmp_path, seeds=1, steps=40), tmp_path / "runs"
  master, slave = os.openpty()
  monkeypatch.setenv("TERM", "xterm")
  process = launcher(spec, "slow", stdout=slave)
  os.close(slave)
  drawn = b""
  try:
    while chunk := os.read(master, 4096):
      drawn += chunk
  except OSError:  # how a terminal says that its last writer is gone
    pass
  os.close(master)
  assert process.wait(timeout=PATIENCE) == 0
  assert b"running" in drawn
  assert b"1 running, 0 waiting of 1" in drawn
  assert b"all 1 cells are finished" in drawn
  assert pathlib.Path(out, "tiny", BASE, "log.txt").exists()
