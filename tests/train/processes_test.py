"""Runs of several processes on this machine: the same batches and the same curve as one."""

import dataclasses
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from moe_jax.grid import select
from moe_jax.run_dir import EXIT_BUSY, EXIT_DIVERGED, EXIT_PREEMPTED, RunDir
from tests.experiment_files import ROOT, write

STEPS, EVERY = 24, 4
SOURCE = f'''
from moe_jax.config import *
from moe_jax.grid import Grid

RECIPE = RunConfig(
    arch=Architecture(n_layers=1, d_model=16, d_expert=8, n_exp=4, n_topk=2, n_heads=2),
    model=ModelConfig(compute_dtype="float32"), data=DataConfig(seq_len=16),
    train=TrainConfig(steps={STEPS}, warmup_steps=2, batch_size=8),
    execution=ExecutionConfig(mesh=MeshConfig(-1, 1, 1), log_every=1, checkpoint_every={EVERY}))


def get_grid():
  return Grid("tiny", RECIPE, (RECIPE,))
'''
OBSERVED = pathlib.Path(__file__).with_name("observed.py")


@dataclasses.dataclass
class Runner:
  """Runs the trainer of the tiny cell in `out`, as any number of processes."""

  spec: str
  out: pathlib.Path
  attempts: int = 0

  def start(self, n: int, devices: int, *overrides: str, of_one=()) -> list[subprocess.Popen]:
    """n processes with so many devices each; the last also gets the flags `of_one`."""
    self.attempts += 1
    self.out.mkdir(exist_ok=True)
    with socket.create_server(("localhost", 0)) as free:
      port = free.getsockname()[1]
    environment = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0 "
                                f"--xla_force_host_platform_device_count={devices}"}
    together = [f"--coordinator_address=localhost:{port}", f"--num_processes={n}"]
    return [subprocess.Popen(
        [sys.executable, OBSERVED, self.out / f"hashes-{self.attempts}-{i}",
         f"--config={self.spec}", f"--out={self.out}", *overrides,
         *([*together, f"--process_id={i}"] if n > 1 else ()), *(of_one if i == n - 1 else ())],
        cwd=ROOT, env=environment | {"PYTHONPATH": str(ROOT)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE) for i in range(n)]

  def run(self, n: int, devices: int, *overrides: str, of_one=()):
    return ended(self.start(n, devices, *overrides, of_one=of_one))

  def start_and_wait_for(self, pattern: str, n: int, devices: int) -> list[subprocess.Popen]:
    processes = self.start(n, devices)
    while not list(self.out.glob(f"tiny/*/{pattern}")):
      assert all(process.poll() is None for process in processes), ended(processes)
      time.sleep(0.002)
    return processes

  def run_dir(self, **changes) -> RunDir:
    return RunDir.of(self.out, select(self.spec, changes)[0])

  def curve(self, name="loss"):
    return [record[name] for record in self.run_dir().read_metrics()]

  def hashes(self, attempt: int) -> list[int]:
    """Of the global batches of an attempt, as far as all processes have seen them."""
    files = sorted(self.out.glob(f"hashes-{attempt}-*"))
    each = [[int(line) for line in file.read_text().splitlines()] for file in files]
    return [sum(of_step) for of_step in zip(*each, strict=False)]


def ended(processes):
  """(exit code, stdout, stderr) of each."""
  words = [process.communicate() for process in processes]
  return [(process.returncode, *said) for process, said in zip(processes, words, strict=True)]


def codes(outcomes):
  return [code for code, _, _ in outcomes]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
  """The same run by one process."""
  folder = tmp_path_factory.mktemp("one")
  runner = Runner(write(folder, SOURCE), folder / "runs")
  ((code, _, err),) = runner.run(1, 2)
  assert code == 0, err
  assert len(runner.hashes(1)) == STEPS == len(set(runner.hashes(1)))
  return runner


@pytest.fixture
def runner(tmp_path, one):
  """The same cell in an empty directory, with prepared data and compiled programs."""
  for name in ("_data", "_compilation_cache"):
    shutil.copytree(one.out / name, tmp_path / "runs" / name)
  return Runner(one.spec, tmp_path / "runs")


def assert_same_curve(runner, one):
  """To 1e-3; the first step to 1e-5 with the same routing."""
  ours, theirs = runner.curve(), one.curve()
  assert len(ours) == STEPS
  np.testing.assert_allclose(ours, theirs, rtol=1e-3)
  np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-5)
  for name in ("drop_rate", "load_variation"):
    np.testing.assert_allclose(runner.curve(name)[0], one.curve(name)[0], rtol=1e-6)


def test_two_processes_train_as_one(runner, one):
  outcomes = runner.run(2, 2)
  assert codes(outcomes) == [0, 0], outcomes
  assert runner.hashes(1) == one.hashes(1)
  assert_same_curve(runner, one)
  files = [len((runner.out / f"hashes-1-{i}").read_text().splitlines()) for i in range(2)]
  assert files == [STEPS, STEPS]
  # Process 0 alone speaks and writes.
  assert "loss" in outcomes[0][1] and "loss" not in outcomes[1][1]
  folder = pathlib.Path(runner.run_dir().path)
  assert len(list((folder / "tensorboard").iterdir())) == 1
  assert {file.name[:4] for file in (folder / "metrics").iterdir()} == {"0001"}
  assert runner.run_dir().read_status()["state"] == "finished"
  assert runner.run_dir().read_status()["n_devices"] == 4


def test_processes_of_different_configurations_are_refused_and_write_nothing(runner):
  outcomes = runner.run(2, 2, of_one=["--config.seed_data=3"])
  assert codes(outcomes) == [2, 2]
  assert ("--process_id=1: differs from process 0: cell is 'tiny/l1-d16-f8-e4-k2-seed_data3' "
          in outcomes[1][2]) or "config.seed_data is 3 here and 0 there" in outcomes[1][2]
  assert "process 1 on" in outcomes[0][2] and "config.seed_data is 3" in outcomes[0][2]
  assert not (runner.out / "tiny").exists()


def test_what_process_0_alone_finds_ends_all(runner):
  runner.run_dir().path.mkdir(parents=True)
  with runner.run_dir().lock():
    outcomes = runner.run(2, 2)
  assert codes(outcomes) == [EXIT_BUSY, EXIT_BUSY]
  assert f"in use by process {os.getpid()}" in outcomes[0][2]
  assert "because process 0 on" in outcomes[1][2] and "in use by" in outcomes[1][2]


@pytest.mark.slow
def test_stopped_and_killed_and_resumed_by_other_numbers_of_processes(runner, one):
  """Two, one of them told to stop; four, one of them killed; then one."""
  processes = runner.start_and_wait_for(f"checkpoints/{EVERY}", 2, 2)
  processes[1].send_signal(signal.SIGTERM)
  outcomes = ended(processes)
  assert codes(outcomes) == [EXIT_PREEMPTED] * 2, outcomes
  assert "stopped by SIGTERM" in outcomes[0][2]
  stopped = runner.run_dir().read_status()
  assert stopped["state"] == "preempted" and EVERY < stopped["step"] < STEPS
  assert (runner.run_dir().checkpoints / str(stopped["step"])).exists()

  later = 2 * EVERY + stopped["step"] // EVERY * EVERY
  processes = runner.start_and_wait_for(f"checkpoints/{later}", 4, 1)
  processes[2].kill()
  outcomes = ended(processes)
  assert codes(outcomes) == [1, 1, -signal.SIGKILL, 1], outcomes
  for i in (0, 1, 3):
    assert "stopped, because process 2 has sent no heartbeat for 30 s" in outcomes[i][2]
  assert runner.run_dir().read_status()["state"] == "failed"
  assert "process 2" in runner.run_dir().read_status()["error"]

  ((code, out, err),) = runner.run(1, 2)
  assert code == 0, err
  begins = [0, stopped["step"], int(out.partition("resuming from step ")[2].split()[0])]
  assert begins[2] >= later
  for attempt, begin in enumerate(begins, start=1):
    seen = runner.hashes(attempt)
    assert seen and seen == one.hashes(1)[begin:begin + len(seen)]
  assert_same_curve(runner, one)


@pytest.mark.slow
def test_four_processes_train_as_one(runner, one):
  """On another mesh and in microbatches, where a process's rows do not stand together."""
  outcomes = runner.run(4, 1, "--config.execution.mesh.expert=2",
                        "--config.execution.microbatches=2")
  assert codes(outcomes) == [0] * 4, outcomes
  assert runner.hashes(1) == one.hashes(1)
  assert_same_curve(runner, one)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_all(runner):
  override = "--config.train.learning_rate=1e30"
  outcomes = runner.run(2, 2, override)
  assert codes(outcomes) == [EXIT_DIVERGED] * 2, outcomes
  assert runner.run_dir(**{"train.learning_rate": 1e30}).read_status()["state"] == "diverged"


@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over_by_all(runner, one):
  shutil.copytree(one.run_dir().path, runner.run_dir().path)
  run_dir = runner.run_dir()
  run_dir.write_status(run_dir.read_status() | {"state": "running"})
  data = max(pathlib.Path(run_dir.checkpoints / str(STEPS) / "params").rglob("d/*"),
             key=lambda file: file.stat().st_size)
  content = bytearray(data.read_bytes())
  content[len(content) // 2] ^= 1
  data.write_bytes(content)
  outcomes = runner.run(2, 2)
  assert codes(outcomes) == [0, 0], outcomes
  assert f"checkpoints/{STEPS} is damaged" in outcomes[0][2]
  assert f"resuming from step {STEPS - EVERY}" in outcomes[0][1]
  assert runner.hashes(1) == one.hashes(1)[STEPS - EVERY:]
  assert_same_curve(runner, one)
