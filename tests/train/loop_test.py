"""The trainer as a process: whatever ends it, the same command goes on, bit for bit."""

import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from moe_jax.config import identity_hash
from moe_jax.data.prepare import prepare
from moe_jax.errors import FieldError
from moe_jax.grid import get_config, select
from moe_jax.mesh import make_mesh
from moe_jax.model import functional
from moe_jax.run_dir import EXIT_BUSY, EXIT_DIVERGED, EXIT_PREEMPTED, RunDir
from moe_jax.train import loop
from moe_jax.train import step as step_lib
from moe_jax.train.checkpoint import Checkpointer
from tests.experiment_files import ROOT, write
from tests.small import ONE_DEVICE
from tests.train.checkpoint_states import restore_params

STEPS, EVERY = 24, 6
SOURCE = f'''
from moe_jax.config import *
from moe_jax.grid import Grid

RECIPE = RunConfig(
    arch=Architecture(n_layers=1, d_model=16, d_expert=8, n_exp=4, n_topk=2, n_heads=2),
    model=ModelConfig(compute_dtype="float32"), data=DataConfig(seq_len=16),
    train=TrainConfig(steps={STEPS}, warmup_steps=2, batch_size=8),
    execution=ExecutionConfig(mesh=MeshConfig(1, 1, 1), log_every=1, checkpoint_every={EVERY}))


def get_grid():
  return Grid("tiny", RECIPE, (RECIPE,))
'''
# One device: eight fake ones compile longer. A real run would have no such flag.
ENVIRONMENT = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}


@dataclasses.dataclass
class Runner:
  """Runs the trainer of the tiny cell in `out`."""

  spec: str
  out: pathlib.Path

  def start(self, *overrides: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "moe_jax.train", f"--config={self.spec}", f"--out={self.out}",
         *overrides], cwd=ROOT, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE)

  def run(self, *overrides: str) -> tuple[int, str, str]:
    process = self.start(*overrides)
    out, err = process.communicate()
    return process.returncode, out, err

  def run_dir(self, **changes) -> RunDir:
    return RunDir.of(self.out, select(self.spec, changes)[0])

  def start_and_wait_for(self, pattern: str, *overrides: str) -> subprocess.Popen:
    """Starts the trainer and returns at the moment a file of this name appears."""
    process = self.start(*overrides)
    while not list(pathlib.Path(self.out).glob(f"tiny/*/{pattern}")):
      assert process.poll() is None, process.communicate()
      time.sleep(0.002)
    return process


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
  """A run that nothing disturbed; also warms the caches that the other tests copy."""
  folder = tmp_path_factory.mktemp("undisturbed")
  runner = Runner(write(folder, SOURCE), folder / "runs")
  assert runner.run()[0] == 0
  return runner


@pytest.fixture
def runner(tmp_path, undisturbed):
  """The same cell in an empty directory, with prepared data and compiled programs."""
  out = tmp_path / "runs"
  for name in ("_data", "_compilation_cache"):
    shutil.copytree(undisturbed.out / name, out / name)
  return Runner(undisturbed.spec, out)


def final_params(runner):
  cell = select(runner.spec)[0]
  mesh = make_mesh(cell.config, jax.devices()[:1])
  step, params, _ = restore_params(RunDir.of(runner.out, cell),
                                   functional.abstract_params(cell.config, mesh))
  assert step == STEPS
  return params


def final_arrays(run_dir):
  """The parameters of the last checkpoint, as bytes."""
  config = run_dir.read_config()
  _, params, _ = restore_params(run_dir, functional.abstract_params(
      config, make_mesh(config, jax.devices()[:1])))
  return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(params)]


def curve(runner):
  """Every number of every step that does not tell the time."""
  return [{name: value for name, value in record.items()
           if name not in ("tokens_per_second", "mfu")}
          for record in runner.run_dir().read_metrics()]


def assert_same_run(runner, undisturbed):
  assert curve(runner) == curve(undisturbed)
  assert [record["step"] for record in curve(runner)] == list(range(1, STEPS + 1))
  for ours, theirs in zip(jax.tree.leaves(final_params(runner)),
                          jax.tree.leaves(final_params(undisturbed)), strict=True):
    np.testing.assert_array_equal(ours, theirs)


def test_a_run_leaves_what_it_should(undisturbed):
  run_dir = undisturbed.run_dir()
  status = run_dir.read_status()
  assert (status["state"], status["step"], status["steps"]) == ("finished", STEPS, STEPS)
  assert status["loss"] == curve(undisturbed)[-1]["loss"] < curve(undisturbed)[0]["loss"]
  assert {"drop_rate", "balance_loss", "z_loss", "grad_norm", "learning_rate",
          "load_variation", "router_entropy"} <= curve(undisturbed)[0].keys()
  assert list(run_dir.tensorboard.iterdir())
  assert json.loads((run_dir.path / "config.json").read_text())["cell"] == run_dir.path.name
  assert run_dir.read_config().execution.mesh == ONE_DEVICE


def test_a_finished_run_is_left_as_it_is(undisturbed):
  folder = pathlib.Path(undisturbed.run_dir().path)
  before = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
  code, out, _ = undisturbed.run()
  assert code == 0 and "finished already" in out
  after = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
  assert {file.name for file in before if before[file] != after.get(file)} <= {"lock"}


@pytest.mark.parametrize("moment", [
    "config.json",  # before the first step
    f"checkpoints/{2 * EVERY}.orbax-checkpoint-tmp*",  # while a checkpoint is written
    f"checkpoints/{2 * EVERY}/params/manifest.ocdbt",  # just after one
])
def test_killed_and_started_again_it_is_bitwise_the_undisturbed_run(moment, runner, undisturbed):
  process = runner.start_and_wait_for(moment)
  process.kill()
  process.communicate()
  assert runner.run_dir().read_status().get("state") != "finished"
  code, _, err = runner.run()
  assert code == 0, err
  assert_same_run(runner, undisturbed)


@pytest.mark.slow
def test_killed_five_times_it_is_bitwise_the_undisturbed_run(runner, undisturbed):
  """Each time within a tenth of a second of the beginning of a new checkpoint."""
  longer, run_dirs = "--config.train.steps=120", []
  assert undisturbed.run(longer)[0] == 0
  for run in (runner, undisturbed):
    run_dirs.append(run.run_dir(**{"train.steps": 120}))
  folder = pathlib.Path(run_dirs[0].checkpoints)
  rng, resumed = np.random.default_rng(0), 0
  for _ in range(5):
    seen = {path.name for path in folder.glob("[0-9]*")}
    process = runner.start(longer)
    while process.poll() is None and {path.name for path in folder.glob("[0-9]*")} <= seen:
      time.sleep(0.002)
    time.sleep(0.1 * rng.random())
    process.kill()
    resumed += "resuming from step" in process.communicate()[0]
  assert resumed, "every kill came before the first checkpoint: nothing was tested"
  assert runner.run(longer)[0] == 0
  ours, theirs = ([record["loss"] for record in run_dir.read_metrics()] for run_dir in run_dirs)
  assert ours == theirs and len(ours) == 120
  assert final_arrays(run_dirs[0]) == final_arrays(run_dirs[1])


def test_sigterm_saves_and_the_same_command_goes_on(runner, undisturbed):
  process = runner.start_and_wait_for(f"checkpoints/{EVERY}")
  for _ in range(3):  # a scheduler tells all processes of a job, and their launcher tells them too
    process.send_signal(signal.SIGTERM)
    time.sleep(0.01)
  _, err = process.communicate()
  assert process.returncode == EXIT_PREEMPTED, err
  assert "stopped by SIGTERM" in err
  status = runner.run_dir().read_status()
  assert status["state"] == "preempted" and EVERY <= status["step"] < STEPS
  code, out, _ = runner.run()
  assert code == 0 and f"resuming from step {status['step']} of {STEPS}" in out
  assert_same_run(runner, undisturbed)


@pytest.mark.slow
def test_another_execution_goes_on_with_the_same_run(runner, undisturbed):
  """Stopped half-way, then resumed with remat and microbatches: the same up to rounding."""
  process = runner.start_and_wait_for(f"checkpoints/{EVERY}")
  process.send_signal(signal.SIGTERM)
  process.communicate()
  code, _, err = runner.run("--config.execution.microbatches=2", "--config.execution.remat=full")
  assert code == 0, err
  losses = [[record["loss"] for record in curve(run)] for run in (runner, undisturbed)]
  np.testing.assert_allclose(*losses, rtol=1e-4)


def test_a_finished_run_whose_last_checkpoint_is_damaged_does_its_end_again(runner, undisturbed):
  shutil.copytree(undisturbed.run_dir().path, runner.run_dir().path)
  run_dir = runner.run_dir()
  data = max(pathlib.Path(run_dir.checkpoints / str(STEPS) / "params").rglob("d/*"),
             key=lambda file: file.stat().st_size)
  content = bytearray(data.read_bytes())
  content[len(content) // 2] ^= 1
  data.write_bytes(content)
  code, out, err = runner.run()
  assert code == 0
  assert "was finished, but its last checkpoint is damaged: params/" in out
  assert f"checkpoints/{STEPS} is damaged" in err
  assert f"resuming from step {STEPS - EVERY}" in out
  assert_same_run(runner, undisturbed)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(runner):
  override = "--config.train.learning_rate=1e30"
  code, _, err = runner.run(override, "--config.execution.checkpoint_every=1")
  assert code == EXIT_DIVERGED
  (message,) = [line for line in err.splitlines() if "stopped" in line]
  run_dir = runner.run_dir(**{"train.learning_rate": 1e30})
  status = run_dir.read_status()
  saved = max(int(step.name) for step in run_dir.checkpoints.iterdir() if step.name.isdecimal())
  assert f"step {saved + 1}" in message and f"that of step {saved}" in message
  assert status["state"] == "diverged" and status["error"] in message
  params = restore_params(run_dir, functional.abstract_params(
      select(runner.spec)[0].config, make_mesh(select(runner.spec)[0].config,
                                               jax.devices()[:1])))[1]
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


def test_the_last_good_checkpoint_is_looked_up_and_not_computed(runner, undisturbed):
  """A resumed run that diverges names what is there, whatever checkpoint_every is now."""
  shutil.copytree(undisturbed.run_dir().path, runner.run_dir().path)
  run_dir = runner.run_dir()
  run_dir.write_status(run_dir.read_status() | {"state": "running"})
  for step in (STEPS, STEPS - EVERY):  # the state is made bad: an infinite moment
    shutil.rmtree(run_dir.checkpoints / str(step))
    run_dir.checksums(step).unlink()
  cell = select(runner.spec)[0]
  mesh = make_mesh(cell.config, jax.devices()[:1])
  state = step_lib.init_state(cell.config, mesh)
  state["params"]["final_norm_D"] = state["params"]["final_norm_D"] * np.inf
  with Checkpointer(run_dir, 2) as checkpointer:
    meta = {"data_fingerprint": prepare(cell.config.data, runner.out / "_data").fingerprint,
            "identity": identity_hash(cell.config)}
    checkpointer.save(7, state, {"next_index": 7}, meta)
  code, _, err = runner.run("--config.execution.checkpoint_every=1000")
  assert code == EXIT_DIVERGED
  assert "loss is nan at step 8: stopped; the last good checkpoint is that of step 7" in err


def test_the_commit_is_of_this_code_and_of_no_checkout_around_it(tmp_path, monkeypatch):
  for name in [name for name in os.environ if name.startswith("GIT_")]:  # as in a hook
    monkeypatch.delenv(name)
  for arguments in (["init", "-q"], ["-c", "user.name=a", "-c", "user.email=a@b",
                                     "-c", "commit.gpgsign=false", "commit", "-q",
                                     "--allow-empty", "-m", "theirs"]):
    subprocess.run(["git", *arguments], cwd=tmp_path, check=True)
  monkeypatch.setenv("MOE_JAX_COMMIT", "sent")
  monkeypatch.setattr(loop, "_ROOT", tmp_path)
  assert len(loop.git_commit()) == 12
  (tmp_path / "edited").touch()
  assert loop.git_commit().endswith("+")
  installed = tmp_path / ".venv" / "site-packages"
  installed.mkdir(parents=True)
  monkeypatch.setattr(loop, "_ROOT", installed)
  assert loop.git_commit() == "sent"


def test_a_profile_on_request(runner):
  code, _, err = runner.run("--profile_steps=2:3")
  assert code == 0, err
  files = list(pathlib.Path(runner.run_dir().profile).glob("plugins/profile/*/*.xplane.pb"))
  assert len(files) == 1 and files[0].stat().st_size > 10_000


def test_a_second_process_is_refused_and_a_dead_ones_lock_is_free(runner, undisturbed):
  first = runner.start_and_wait_for(f"checkpoints/{EVERY}", "--config.train.steps=20000",
                                    "--config.train.warmup_steps=2")
  code, _, err = runner.run("--config.train.steps=20000")
  assert code == EXIT_BUSY
  assert err.count("\n") == 1 and f"in use by process {first.pid}" in err
  first.kill()
  first.communicate()
  third = runner.start("--config.train.steps=20000")
  while f'"pid": {third.pid}' not in (
      runner.run_dir(**{"train.steps": 20000}).path / "status.json").read_text():
    assert third.poll() is None, third.communicate()
    time.sleep(0.05)
  third.kill()
  third.communicate()


@pytest.mark.parametrize("override,line", [
    ("--config.train.stepz=3", "--config.train.stepz='3': no such field; did you mean "
     "'config.train.steps'"),
    ("--config.arch.n_topk=9", "--config.arch.n_topk=9: must be at most n_exp"),
    ("--config.arch.d_model=18", "--config.arch.head_dim=9: must be even"),
    ("--config.execution.mesh.expert=3", "--config.execution.mesh.expert=3: "),
    ("--config.execution.microbatches=3", "--config.train.batch_size=8: "),
    ("--config.moe.routing_group_tokens=24", "--config.moe.routing_group_tokens=24: "),
    ("--config.data.corpus=sotuu", "--config.data.corpus='sotuu': "),
    ("--config.train.batch_size=10000000", "--config.train.batch_size=10000000: "),
])
def test_bad_input_is_one_line_and_writes_nothing(override, line, runner):
  code, _, err = runner.run(override)
  assert code == 2
  assert err.startswith("error: " + line) and err.count("\n") == 1, err
  assert not (runner.out / "tiny").exists()


def test_a_branch_of_no_run_is_refused_before_a_text_is_prepared(tmp_path, undisturbed):
  with pytest.raises(FieldError, match="config.train.branch_from='absent@12': there is no run at"):
    loop.train(*select(undisturbed.spec, {"train.branch_from": "absent@12"}), tmp_path)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("field, shown", [
    ("processes", "processes"), ("from", "from"), ("out", "out"),
    ("data.corpus", "config.data.corpus")])
def test_only_what_is_of_the_configuration_is_named_so(field, shown, tmp_path, monkeypatch,
                                                       undisturbed):
  def prepare(data, folder):
    raise FieldError(field, 8, "is refused")

  monkeypatch.setattr(loop, "prepare", prepare)
  with pytest.raises(FieldError) as caught:
    loop._fitting(get_config(undisturbed.spec, {"execution.mesh.data": -1}), 1, tmp_path)
  assert caught.value.field == shown


def test_a_directory_of_another_identity_is_refused(runner, tmp_path):
  cell = select(runner.spec)[0]
  other = dataclasses.replace(cell, config=dataclasses.replace(cell.config, seed_init=5))
  RunDir.of(runner.out, cell).claim(other)
  code, _, err = runner.run()
  assert code == 2 and err.count("\n") == 1
  assert "another identity: seed_init is 0 here and 5 there" in err


def test_a_checkpoint_of_another_identity_is_refused(runner, undisturbed):
  """config.json is lost and the recipe has changed: the arrays alone would fit."""
  shutil.copytree(undisturbed.run_dir().path, runner.run_dir().path)
  folder = runner.run_dir().path
  (folder / "config.json").unlink()
  (folder / "status.json").unlink()
  source = SOURCE.replace("warmup_steps=2", "warmup_steps=2, beta1=0.8")
  changed = Runner(write(runner.out.parent, source), runner.out)
  code, _, err = changed.run()
  assert code == 1 and "was saved by a run of another identity" in err


def test_a_full_disk_is_one_line_and_keeps_what_is_there(runner, tmp_path):
  """A real small file system, which fills up between two checkpoints."""
  mount = tmp_path / "disk"
  mount.mkdir()
  if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", mount],
                    capture_output=True).returncode:
    pytest.skip("mounting a small tmpfs is not permitted here")
  try:
    (mount / "runs").mkdir()
    for name in ("_data", "_compilation_cache"):
      (mount / "runs" / name).symlink_to(runner.out / name)
    small = Runner(runner.spec, mount / "runs")
    process = small.start_and_wait_for(f"checkpoints/{EVERY}",
                                       "--config.train.steps=20000")
    subprocess.run(["dd", "if=/dev/zero", f"of={mount}/filler"], capture_output=True)
    _, err = process.communicate()
    assert process.returncode == 1
    # Threads of libraries may cry while a save fails; our word is one line, and the last.
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and err.rstrip().endswith(lines[0]) and "moe_jax/" not in err, err
    assert "disk is full" in lines[0] or "No space left" in lines[0]
    (mount / "filler").unlink()
    process = small.start("--config.train.steps=20000")
    assert "resuming from step" in process.stdout.readline()
    process.kill()
    process.communicate()
  finally:
    subprocess.run(["umount", "-l", mount], check=True)
