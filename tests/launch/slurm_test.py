"""SLURM itself, started for the test: a run of two processes goes through sbatch and a requeue.

Needs Debian's slurm-wlm and munge, and root. Elsewhere it is skipped.
"""

import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

import pytest

from launch.backends import slurm
from launch.code import pack
from launch.jobs import plan, read_launch
from moe_jax.grid import select
from tests.experiment_files import write_tiny
from tests.launch.waiting import wait_until

PATIENCE = 600  # seconds; a loaded machine compiles slowly
_PAUSE = 0.2  # between two looks
_DAEMONS = ("munged", "slurmctld", "slurmd")


def _missing():
  if os.geteuid() != 0:
    return "SLURM's daemons run as root here, and this is not root"
  found = [name for name in _DAEMONS if shutil.which(name) is None]
  return f"no {', '.join(found)}: apt-get install slurm-wlm munge" if found else None


def _port():
  with socket.create_server(("localhost", 0)) as free:
    return free.getsockname()[1]


def _configuration(folder):
  host = socket.gethostname().partition(".")[0]
  lines = {
      "ClusterName": "here", "SlurmctldHost": f"{host}(127.0.0.1)", "SlurmUser": "root",
      "SlurmdUser": "root", "SlurmctldPort": _port(), "SlurmdPort": _port(),
      "AuthType": "auth/munge", "CredType": "cred/munge",
      "AuthInfo": f"socket={folder}/munge.socket,cred_expire=5", "MpiDefault": "none",
      "ProctrackType": "proctrack/linuxproc", "TaskPlugin": "task/none",
      "SelectType": "select/cons_tres", "SelectTypeParameters": "CR_CPU", "KillWait": 5,
      "StateSaveLocation": f"{folder}/state", "SlurmdSpoolDir": f"{folder}/spool",
      "SlurmctldPidFile": f"{folder}/slurmctld.pid", "SlurmdPidFile": f"{folder}/slurmd.pid",
      "SlurmctldLogFile": f"{folder}/slurmctld.log", "SlurmdLogFile": f"{folder}/slurmd.log",
      "JobRequeue": 1, "ReturnToService": 2}
  nodes = (f"NodeName={host} NodeAddr=127.0.0.1 CPUs={os.cpu_count()} State=UNKNOWN",
           f"PartitionName=all Nodes={host} Default=YES OverSubscribe=FORCE:4 State=UP")
  return "\n".join([*(f"{key}={value}" for key, value in lines.items()), *nodes]) + "\n"


@pytest.fixture
def cluster(monkeypatch):
  """A cluster of this machine alone, for as long as the test runs."""
  if reason := _missing():
    pytest.skip(reason)
  # Not below pytest's folder, which munge finds too open; and socket paths must be short.
  folder = pathlib.Path(tempfile.mkdtemp(prefix="slurm-"))
  folder.chmod(0o711)
  (folder / "state").mkdir()
  (folder / "spool").mkdir()
  (folder / "key").write_bytes(os.urandom(1024))
  (folder / "key").chmod(0o400)
  (folder / "slurm.conf").write_text(_configuration(folder))
  monkeypatch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
  commands = (
      ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket",
       f"--key-file={folder}/key", f"--log-file={folder}/munged.log",
       f"--pid-file={folder}/munged.pid", f"--seed-file={folder}/seed"],
      ["slurmctld", "-D"], ["slurmd", "-D"])
  daemons = []
  for command in commands:
    daemons.append(subprocess.Popen(command, stdout=subprocess.DEVNULL,
                                    stderr=subprocess.DEVNULL))
    time.sleep(1)
  try:
    wait_until(lambda: "idle" in _said("sinfo", "--noheader", "--format=%T"), 60, _PAUSE)
    yield folder
  finally:
    _said("scancel", "--me", "--signal=KILL", "--full")
    _said("scancel", "--me")
    for daemon in reversed(daemons):
      daemon.send_signal(signal.SIGTERM)
      daemon.wait(30)
    shutil.rmtree(folder, ignore_errors=True)


def _said(*command):
  return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.strip()


@pytest.mark.slow
def test_a_run_of_two_processes_is_requeued_and_finishes(tmp_path, cluster, monkeypatch, capsys):
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=1")
  spec, out = write_tiny(tmp_path, seeds=1, steps=300), str(tmp_path / "runs")
  jobs, code = plan(select(spec), out, []), pack(spec)
  options = slurm.Options(gpus_per_node=0, tasks_per_node=2, python=sys.executable)
  planned = slurm.plan(jobs, options, code, out)
  (array,), run_dir = planned.slices, jobs[0].run_dir

  assert slurm.submit(planned, jobs, options, code, out) == 0
  assert slurm.submit(planned, jobs, options, code, out) == 0
  assert "is already in the queue" in capsys.readouterr().out
  job = f"{_said('squeue', '--me', '--noheader', '--format=%F').splitlines()[0]}_0"

  def log():
    file = tmp_path / "runs" / "tiny" / "_slices" / array.name / "log-0.txt"
    return file.read_text() if file.exists() else ""

  try:
    wait_until(run_dir.has_checkpoint, PATIENCE, _PAUSE)
    _said("scontrol", "requeue", job)
    wait_until(lambda: run_dir.read_status().get("state") == "finished", PATIENCE, _PAUSE)
    wait_until(lambda: not _said("squeue", "--me", "--noheader"), PATIENCE, _PAUSE)
  except AssertionError:
    pytest.fail(f"{_said('squeue', '--me', '--all')}\n{log()}\n"
                f"{(cluster / 'slurmd.log').read_text()[-3000:]}")
  assert "Restarts=1 " in _said("scontrol", "show", "job", job)
  assert "resuming from step" in log()
  launch = read_launch(run_dir)
  assert (launch.state, launch.attempt, launch.failures) == ("finished", 2, 0)
  assert [record["step"] for record in run_dir.read_metrics()] == list(range(10, 301, 10))
