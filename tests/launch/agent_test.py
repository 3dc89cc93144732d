"""The agent on a slice's machines, with real processes: cells in turn, budgets, one attempt for
all hosts."""

import dataclasses
import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import types

import pytest
from etils import epath

from launch.code import Code
from launch.host import agent as agent_lib
from launch.host import machine
from launch.host.agent import Agent, Pace
from launch.host.trainer import Trainer
from launch.jobs import Launch, jobs_of, read_launch, write_launch
from launch.shares import deal
from launch.work import Work, from_text, to_text, why_ended, work_of
from moe_jax.errors import DamagedFile
from moe_jax.grid import select
from moe_jax.run_dir import EXIT_BUSY, EXIT_PREEMPTED, is_gone
from tests.experiment_files import ROOT, write, write_tiny
from tests.launch.branch_test import SOURCE
from tests.launch.submitter import TRAINER
from tests.launch.waiting import wait_until

PATIENCE = 300  # seconds, in which a starved machine too has done it


def _work(tmp_path, behaviors, **fields):
  """A work.json of tiny cells; its path."""
  spec, out = write_tiny(tmp_path, seeds=len(behaviors), steps=fields.pop("steps", 20)), str(
      tmp_path / "runs")
  cells = {cell.name: ("python", str(TRAINER), behavior, f"--config={cell.selector}",
                       f"--out={out}")
           for cell, behavior in zip(select(spec), behaviors, strict=True)}
  file = tmp_path / "runs" / "tiny" / "_slices" / "s0" / "work.json"
  file.parent.mkdir(parents=True)
  file.write_text(to_text(Work("s0", "tiny", out, cells, backend="test", **fields)))
  return file


def _run(file, **environment):
  return subprocess.Popen(
      [sys.executable, "-m", "launch.host", f"--work={file}", "--poll_seconds=0.05",
       "--retry_seconds=0.05"], cwd=ROOT, text=True, stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT, env={**os.environ, "PYTHONPATH": str(ROOT), **environment})


def _launches(file):
  todo = from_text(file.read_text(), file)
  return [read_launch(todo.run_dir(name)) for name in todo.cells]


def test_cells_are_trained_in_turn_and_failures_have_a_budget(tmp_path):
  file = _work(tmp_path, ["ok", "crash_once", "broken", "diverge"])
  agent = _run(file)
  output, _ = agent.communicate(timeout=PATIENCE)
  assert agent.returncode == 0, output
  launches = _launches(file)
  assert [launch.state for launch in launches] == ["finished", "finished", "failed", "diverged"]
  assert [launch.failures for launch in launches] == [0, 1, 3, 0]
  assert [launch.attempt for launch in launches] == [1, 2, 3, 1]
  assert "given up after 3 failures" in output
  now = json.loads((file.parent / "now.json").read_text())
  assert now["done"] and now["sequence"] == 8  # seven attempts, and the end


def _here(agent):
  """Runs an agent in this process, whose signals it takes over."""
  before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
  try:
    return agent.run()
  finally:
    signal.signal(signal.SIGTERM, before[0])
    signal.signal(signal.SIGINT, before[1])


def test_a_hung_run_is_ended_and_counts_as_a_failure(tmp_path, capfd):
  file = _work(tmp_path, ["hang_once"])
  todo = from_text(file.read_text(), file)
  (run_dir,) = (todo.run_dir(name) for name in todo.cells)
  hours = itertools.count()

  def clock():  # stands still, but for when the run does: a slow start is no hang
    status = run_dir.read_status()
    hung = (status.get("step"), status.get("attempt")) == (7, 1) and not is_gone(
        status["host"], status["pid"])
    return 3600.0 * next(hours) if hung else 0.0

  pace = Pace(poll=0.05, retry=0.05, hang=5000.0)
  assert _here(Agent(todo, epath.Path(file.parent), "0-0", pace, clock=clock)) == 0
  assert "hung at step 7: no step for 5000 s" in capfd.readouterr().out
  (launch,) = _launches(file)
  assert (launch.state, launch.failures, launch.attempt) == ("finished", 1, 2)


def test_a_leader_waits_for_the_other_hosts_and_gives_up_on_them(tmp_path, capfd):
  file = _work(tmp_path, ["ok"], hosts=2)
  agent = Agent(from_text(file.read_text(), file), epath.Path(file.parent), "0-0",
                Pace(poll=0.01, retry=0.01, hang=0.2))
  assert _here(agent) == 1
  assert "are unusable: only 1 of 2 hosts reported within 0 s\n" in capfd.readouterr().out
  assert json.loads((file.parent / "host-0-0.json").read_text())["state"] == "dirty"
  assert _launches(file) == [None]  # no attempt was made, none counts


def test_an_agent_that_fails_takes_its_trainer_with_it(tmp_path, monkeypatch):
  file = _work(tmp_path, ["hang_once"])
  todo = from_text(file.read_text(), file)
  agent, begun = Agent(todo, epath.Path(file.parent), "0-0", Pace(poll=0.05, retry=0.05)), []
  real = agent_lib.Trainer
  monkeypatch.setattr(agent_lib, "Trainer", lambda *given: begun.append(real(*given)) or begun[0])
  monkeypatch.setattr(Agent, "_beat", lambda self, cell: (_ for _ in ()).throw(KeyError("bug")))
  with pytest.raises(KeyError):
    _here(agent)
  assert begun and begun[0].poll() is not None


def _outcome(launch, code, stopped=False):
  return agent_lib._outcome(launch, code, "", finished=False, told=True, stopped=stopped)


def test_being_killed_after_we_said_stop_is_no_failure():
  launch = Launch("test", (), 1, "here", 1, 0.0)
  assert _outcome(launch, -signal.SIGKILL).failures == 1
  told = _outcome(launch, -signal.SIGKILL, stopped=True)
  assert (told.state, told.failures) == ("stopped", 0)


def test_failures_count_from_what_was_saved_last(tmp_path):
  file = _work(tmp_path, ["ok"])
  todo = from_text(file.read_text(), file)
  (name,) = todo.cells
  agent, run_dir = Agent(todo, epath.Path(file.parent), "0-0"), todo.run_dir(name)
  trainer = types.SimpleNamespace(command=(), pid=1, started=0.0)
  for saved, failures in ((0, 2), (0, 3), (20, 1)):
    if saved:
      (run_dir.checkpoints / str(saved)).mkdir(parents=True)
    else:
      write_launch(run_dir, Launch("test", (), 1, "here", 1, 0.0, failures=failures - 1))
    launch = _outcome(agent._begun(name, trainer), 1)
    assert (launch.failures, launch.saved) == (failures, saved)
    write_launch(run_dir, launch)


def test_only_attempts_in_a_row_that_find_a_run_held_give_it_up(tmp_path):
  file = _work(tmp_path, ["ok"])
  todo = from_text(file.read_text(), file)
  (name,) = todo.cells
  agent = Agent(todo, epath.Path(file.parent), "0-0")
  launch = Launch("test", (), agent_lib._MAX_BUSY, "here", 1, 0.0)
  states = [agent._ended(name, launch, code, None, False, alone=True).state
            for code in [EXIT_BUSY] * (agent_lib._MAX_BUSY - 1) + [EXIT_PREEMPTED, EXIT_BUSY]]
  assert states[-2:] == ["preempted", "busy"] and set(states[:-2]) == {"busy"}
  states = [agent._ended(name, launch, EXIT_BUSY, None, False, alone=True).state
            for _ in range(agent_lib._MAX_BUSY)]
  assert "failed" in states


def test_what_a_trainer_left_behind_is_ended_once(monkeypatch):
  """Later its process number may be that of somebody else's group."""
  killed = []
  monkeypatch.setattr(os, "killpg", lambda *group: killed.append(group))
  trainer = Trainer(("python", "-c", ""), {})
  wait_until(lambda: trainer.poll() is not None, PATIENCE)
  assert (trainer.poll(), trainer.stop(), killed) == (0, 0, [(trainer.pid, signal.SIGKILL)])


def _work_of_branches(tmp_path, behavior):
  """A trunk that behaves so, and its two branches, as a submission would write them."""
  jobs = jobs_of(select(write(tmp_path, SOURCE, "budgets.py")), str(tmp_path / "runs"), [])
  (share,) = deal(jobs, 3)
  todo = work_of(share, Code("c", "a" * 64, "e.py", b""), str(tmp_path / "runs"), "test")
  cells = {job.name: ("python", str(TRAINER), "ok" if job.cell.config.train.branch_from else
                      behavior, *job.command[3:]) for job in share.jobs}
  file = tmp_path / "runs" / "budgets" / "_slices" / share.name / "work.json"
  file.parent.mkdir(parents=True)
  file.write_text(to_text(dataclasses.replace(todo, cells=cells, max_failures=1)))
  return file


def test_a_branch_is_trained_when_its_trunk_has_saved_its_step(tmp_path, capfd):
  file = _work_of_branches(tmp_path, "ok")
  todo = from_text(file.read_text(), file)
  assert [step for _, step in todo.trunks.values()] == [8, 16]
  assert _here(Agent(todo, epath.Path(file.parent), "0-0", Pace(0.02, 0.02))) == 0
  assert [launch.state for launch in _launches(file)] == ["finished"] * 3


def test_a_branch_whose_trunk_is_given_up_is_not_begun(tmp_path, capfd):
  file = _work_of_branches(tmp_path, "broken")
  todo = from_text(file.read_text(), file)
  assert _here(Agent(todo, epath.Path(file.parent), "0-0", Pace(0.02, 0.02))) == 0
  trunk, *branches = _launches(file)
  assert (trunk.state, branches) == ("failed", [None, None])
  name = next(iter(todo.cells))
  said = capfd.readouterr().out
  for step in (8, 16):
    assert f"given up: its trunk {name} ended before it saved step {step}" in said
  run_dir = todo.run_dir(list(todo.cells)[1])  # one that has begun needs it no more
  (run_dir.checkpoints / "9").mkdir(parents=True)
  assert why_ended(todo, list(todo.cells)[1]) is None


def test_told_to_stop_it_saves_and_the_next_agent_goes_on(tmp_path):
  file = _work(tmp_path, ["slow"], steps=100)
  agent = _run(file)
  status = tmp_path / "runs" / "tiny"
  wait_until(lambda: any(json.loads(found.read_text())["step"] > 3
                         for found in status.glob("l*/status.json")), PATIENCE)
  agent.send_signal(signal.SIGTERM)
  output, _ = agent.communicate(timeout=PATIENCE)
  assert agent.returncode == 75, output
  (launch,) = _launches(file)
  assert (launch.state, launch.failures) == ("preempted", 0)
  file.write_text(file.read_text().replace('"slow"', '"ok"'))
  agent = _run(file)
  agent.communicate(timeout=PATIENCE)
  (launch,) = _launches(file)
  assert (agent.returncode, launch.state, launch.attempt) == (0, "finished", 2)


def test_all_hosts_are_in_the_same_attempt(tmp_path):
  """A crash on the leader begins a new attempt on the follower too."""
  file = _work(tmp_path, ["crash_once", "ok"], hosts=2)
  log = tmp_path / "follower.txt"
  waiting = tmp_path / "leader.py"  # each attempt of it waits until the follower has begun its own
  waiting.write_text(
      "import os, pathlib, sys, time\n"
      f"attempts, theirs = pathlib.Path({str(tmp_path / 'leader.txt')!r}), "
      f"pathlib.Path({str(log)!r})\n"
      "with open(attempts, 'a') as file: print('one', file=file)\n"
      "def lines(file): return len(file.read_text().split()) if file.exists() else 0\n"
      f"deadline = time.monotonic() + {PATIENCE / 5}\n"
      "while lines(theirs) < lines(attempts) and time.monotonic() < deadline: time.sleep(0.02)\n"
      "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])\n")
  script = tmp_path / "follower.py"  # what a host beside the leader runs: it only says so
  script.write_text("import pathlib, sys, time\n"
                    f"with open({str(log)!r}, 'a') as log: print(sys.argv[1], file=log)\n"
                    "time.sleep(600)\n")
  todo = json.loads(file.read_text())
  file.write_text(json.dumps(todo | {"cells": {
      name: ["python", str(waiting), *command[1:]] for name, command in todo["cells"].items()}}))
  leader = _run(file, SLURM_PROCID="0")
  todo["cells"] = {name: ["python", str(script), name] for name in todo["cells"]}
  theirs = file.with_name("follower-work.json")
  theirs.write_text(json.dumps(todo))
  follower = _run(theirs, SLURM_PROCID="1")
  assert leader.wait(PATIENCE) == 0
  output, _ = follower.communicate(timeout=PATIENCE)
  assert follower.returncode == 0, output
  first, second = todo["cells"]
  assert log.read_text().split() == [first, first, second]
  hosts = sorted(found.name for found in file.parent.glob("host-*.json"))
  assert hosts == ["host-0-0.json", "host-0-1.json"]


def test_the_word_of_an_earlier_life_is_not_followed(tmp_path):
  """A follower that SLURM has restarted begins nothing before its leader has."""
  file = _work(tmp_path, ["ok"], hosts=2)
  begun = tmp_path / "begun"
  todo = json.loads(file.read_text())
  script = f"open({str(begun)!r}, 'a').write('x'); import time; time.sleep(600)"
  todo["cells"] = {name: ["python", "-c", script] for name in todo["cells"]}
  file.write_text(json.dumps(todo))
  (name,) = todo["cells"]

  def now(sequence, life, cell):
    (file.parent / "now.json").write_text(json.dumps(
        {"sequence": sequence, "life": life, "cells": [cell] if cell else [],
         "done": cell is None}))

  now(4, "", name)  # as the first life left it
  follower = _run(file, SLURM_PROCID="1", SLURM_RESTART_COUNT="1")
  wait_until(lambda: (file.parent / "host-0-1.json").exists(), PATIENCE)
  time.sleep(0.5)  # ten looks
  assert not begun.exists()
  now(5, "1", name)
  wait_until(begun.exists, PATIENCE)
  now(6, "1", None)
  output, _ = follower.communicate(timeout=PATIENCE)
  assert (follower.returncode, begun.read_text()) == (0, "x"), output


def test_secrets_reach_the_trainer_and_no_file(tmp_path):
  secret, seen = tmp_path / "token", tmp_path / "seen"
  secret.write_text("hunter2\n")
  script = tmp_path / "show.py"
  script.write_text(f"import os; open({str(seen)!r}, 'w').write(os.environ['TOKEN'])\n")
  file = _work(tmp_path, ["ok"], secrets={"TOKEN": str(secret)}, max_failures=1)
  todo = json.loads(file.read_text())
  todo["cells"] = {name: ["python", str(script)] for name in todo["cells"]}
  file.write_text(json.dumps(todo))
  output, _ = _run(file).communicate(timeout=PATIENCE)
  assert seen.read_text() == "hunter2"
  texts = [path.read_text() for path in (tmp_path / "runs").rglob("*") if path.is_file()]
  assert not any("hunter2" in text for text in [output, *texts])
  secret.unlink()
  output, _ = _run(file).communicate(timeout=PATIENCE)
  assert output.startswith(f"error: secret TOKEN cannot be read from {secret}: ")


def test_a_dirty_machine_says_so_and_trains_nothing(tmp_path):
  file = _work(tmp_path, ["ok"])
  todo = from_text(file.read_text(), file)
  assert _here(Agent(todo, epath.Path(file.parent), "0-0",
                     trouble=lambda: "/dev/vfio/0 is held")) == 1
  said = json.loads((file.parent / "host-0-0.json").read_text())
  assert (said["state"], said["trouble"]) == ("dirty", "/dev/vfio/0 is held")
  assert not (file.parent / "now.json").exists()


def test_chips_that_another_process_holds_are_found(tmp_path):
  lock, proc = tmp_path / "libtpu_lockfile", tmp_path / "proc"
  lock.touch()
  (proc / "41" / "fd").mkdir(parents=True)
  (proc / "41" / "fd" / "3").symlink_to("/dev/null")
  assert machine.trouble(proc, lock) is None
  assert not lock.exists()  # left behind by a process that is gone
  lock.touch()
  (proc / "41" / "fd" / "4").symlink_to("/dev/vfio/2")
  assert machine.trouble(proc, lock) == "/dev/vfio/2 is held by process 41"
  assert lock.exists()


@pytest.mark.parametrize("environ, attributes, worker", [
    ({"SLURM_PROCID": "3"}, {}, "0-3"),
    ({"JOB_COMPLETION_INDEX": "1", "MOE_JAX_SLICE": "2"}, {}, "2-1"),
    ({}, {"agent-worker-number": "1", "tpu-env": "TYPE: 'v6e'\nMEGASCALE_SLICE_ID: '1'\n"},
     "1-1"),
    ({}, {"agent-worker-number": "0", "tpu-env": "TYPE: 'v6e'\n"}, "0-0"),
])
def test_each_host_knows_its_number(environ, attributes, worker):
  assert machine.worker_number(4, environ, attributes.get) == worker


def test_a_host_without_a_number_is_an_error_unless_it_is_alone():
  assert machine.worker_number(1, {}, {}.get) == "0-0"
  with pytest.raises(RuntimeError, match="4 hosts, and neither SLURM"):
    machine.worker_number(4, {}, {}.get)
  with pytest.raises(RuntimeError, match="returned no tpu-env"):  # or a second leader
    machine.worker_number(4, {}, {"agent-worker-number": "0"}.get)


@pytest.mark.parametrize("text", [
    "", "{", "[]", "{}", "null", '{"cells": {}}',
    '{"name": "s", "experiment": "e", "out": "o", "cells": {"a": "python"}}',
    '{"name": "s", "experiment": "e", "out": "o", "cells": {}, "hosts": "2"}',
    '{"name": "s", "experiment": "e", "out": "o", "cells": {}, "trunks": {"a": ["b"]}}'])
def test_damaged_work_is_named(text):
  with pytest.raises(DamagedFile, match="work='x/work.json': is damaged"):
    from_text(text, pathlib.Path("x/work.json"))
