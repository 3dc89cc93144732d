"""A grid packed into populations by the launcher: one process for several run directories."""

import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time

import pytest

from launch.jobs import jobs_of, read_launch, trained_together
from launch.state import states_of
from moe_jax.grid import select
from moe_jax.run_dir import EXIT_PREEMPTED, RunDir
from tests.experiment_files import BASE, ROOT, run_module, write, write_tiny

SOURCE = '''
import dataclasses
from moe_jax.config import *
from moe_jax.fields import override
from moe_jax.grid import Grid, trunk_and_branches

RECIPE = RunConfig(
    arch=Architecture(n_layers=1, d_model=16, d_expert=8, n_exp=4, n_topk=2, n_heads=2),
    model=ModelConfig(compute_dtype="float32"), data=DataConfig(seq_len=16),
    train=TrainConfig(steps=24, warmup_steps=2, batch_size=8, decay_fraction=0.25),
    execution=ExecutionConfig(mesh=MeshConfig(1, 1, 1), log_every=1, checkpoint_every=6,
                              population=8))
WIDER = override(RECIPE, {"arch.d_expert": 12})


def get_grid():
  return Grid("packed", RECIPE, tuple(GRID))
'''
SWEEP = SOURCE + '''
GRID = [override(RECIPE, {"train.learning_rate": rate}) for rate in (1e-3, 2e-3, 1e30)] + [
    override(WIDER, {"seed_init": 1})]
'''
BRANCHES = SOURCE + '''
GRID = [cell for seed in (1, 2) for cell in trunk_and_branches(
    override(RECIPE, {"seed_init": seed}), RECIPE, (0.5, 1.0))]
'''
ENVIRONMENT = {"XLA_FLAGS": "--xla_backend_optimization_level=0"}


def groups_of(spec, out):
  return [[job.name for job in group] for group in trained_together(
      jobs_of(select(spec), out, []))]


def test_cells_of_one_shape_and_length_are_dealt_together(tmp_path):
  spec = write(tmp_path, SWEEP, "packed.py")
  assert groups_of(spec, tmp_path) == [
      ["l1-d16-f8-e4-k2", "l1-d16-f8-e4-k2-lr2e-3", "l1-d16-f8-e4-k2-lr1e30"],
      ["l1-d16-f12-e4-k2-s1"]]


def test_trunks_come_first_and_branches_of_one_length_together(tmp_path):
  cells = select(write(tmp_path, BRANCHES, "packed.py"))
  groups = [[(cell.config.seed_init, cell.config.train.branch_step, cell.config.train.steps)
             for cell in (job.cell for job in group)]
            for group in trained_together(jobs_of(cells, tmp_path, []))]
  assert groups == [[(1, None, 18), (2, None, 18)], [(1, 9, 12), (2, 9, 12)],
                    [(1, 18, 24), (2, 18, 24)]]


def test_a_run_comes_before_those_that_begin_with_its_parameters(tmp_path):
  spec = write(tmp_path, SOURCE + """
FIRST = Grid("packed", RECIPE, (RECIPE,)).names[0]
GRID = [override(RECIPE, {"train.init_from": source}) for source in (
    f"packed/{FIRST}@6", "old/run@6", f"packed/{FIRST}", None)]
""", "packed.py")
  sources = {cell.name: cell.config.train.init_from for cell in select(spec)}
  assert [[sources[name] for name in group] for group in groups_of(spec, tmp_path)] == [
      ["old/run@6", None], ["packed/l1-d16-f8-e4-k2@6", "packed/l1-d16-f8-e4-k2"]]


def test_a_dry_run_shows_a_command_a_population(tmp_path):
  spec = write_tiny(tmp_path, seeds=5)
  done = run_module("-m", "launch.submit", f"--config={spec}", f"--out={tmp_path}", "--dry_run",
                    "--config.execution.population=2")
  lines = [shlex.split(line) for line in done.stdout.splitlines() if not line.startswith("#")]
  assert [line[3] for line in lines] == [
      f"--config={spec}:{BASE},{BASE}-s1", f"--config={spec}:{BASE}-s2,{BASE}-s3",
      f"--config={spec}:{BASE}-s4"]
  assert all(line[-1] == "--config.execution.population=2" for line in lines)


def test_a_slice_of_one_device_takes_them_and_plans_are_told_to_be_of_one(tmp_path):
  spec = write_tiny(tmp_path, seeds=5)
  done = run_module("-m", "launch.submit", f"--config={spec}", f"--out={tmp_path}/runs",
                    "--dry_run", "--backend=gcloud", "--project=p", "--zones=us-east5-b",
                    "--topology=v6e-1", "--slices=9", "--config.execution.population=2")
  assert done.returncode == 0, done.stderr
  assert "up to 2 cells train together here and need up to 2 times its memory" in done.stdout
  assert sum(line.startswith("gcloud ") for line in done.stdout.splitlines()) == 3, done.stdout


@pytest.mark.parametrize("arguments, line", [
    (("--config.execution.population=0",),
     "--config.execution.population=0: must be at least 1"),
    (("--config.train.population=8",), "--config.train.population='8': no such field; did you "
     "mean 'config.execution.population'"),
    (("--config.execution.population=2", "--processes=2"),
     "--processes=2: must be 1 when cells train together"),
    (("--config.execution.population=2", "--backend=slurm", "--gpus_per_node=4"),
     "--config.execution.population=2: must be 1: cells train together on a single device, and "
     "each run has 4; use v6e-1, v5litepod-1, or one GPU on one node"),
    (("--config.execution.population=2", "--backend=gcloud", "--project=p", "--zones=us-east5-b",
      "--topology=v6e-1", "--slices_per_run=2"),
     "--config.execution.population=2: must be 1: cells train together on a single device, and "
     "each run has 2;")])
def test_what_cannot_be_packed_is_refused_in_one_line(tmp_path, arguments, line):
  spec = write_tiny(tmp_path)
  done = run_module("-m", "launch.submit", f"--config={spec}", f"--out={tmp_path}/runs",
                    *arguments)
  assert done.returncode == 2
  assert done.stderr.startswith("error: " + line) and done.stderr.count("\n") == 1, done.stderr
  assert not (tmp_path / "runs").exists()


PATIENCE = 300  # seconds, in which a starved machine too has done it


def curve(run_dir):
  return [(record["step"], record["loss"]) for record in run_dir.read_metrics()]


def submit(spec, out, *arguments):
  return run_module("-m", "launch.submit", f"--config={spec}", f"--out={out}", "--parallel=2",
                    *arguments, timeout=600, **ENVIRONMENT)


@pytest.mark.slow
def test_a_sweep_is_one_population_and_each_cell_ends_in_its_own_way(tmp_path):
  spec, out = write(tmp_path, SWEEP, "packed.py"), tmp_path / "runs"
  done = submit(spec, out)
  cells = select(spec)
  assert [row.state for row in states_of(out, cells)] == [
      "finished", "finished", "diverged", "finished"], done.stdout + done.stderr
  assert done.returncode == 1 and "3 of 4 cells are finished" in done.stdout
  launches = [read_launch(RunDir.of(out, cell)) for cell in cells]
  assert launches[0].pid == launches[1].pid == launches[2].pid != launches[3].pid
  assert [launch.exit_code for launch in launches] == [0, 0, 76, 0]
  assert str(RunDir.of(out, cells[0]).log) in RunDir.of(out, cells[1]).log.read_text()
  again = submit(spec, out, "--dry_run")
  assert again.stdout.count(" is finished\n") == 3
  (line,) = [line for line in again.stdout.splitlines() if not line.startswith("#")]
  assert f"--config={spec}:{cells[2].name}" in shlex.split(line)


@pytest.mark.slow
def test_branches_of_several_trunks_are_one_population(tmp_path):
  spec, out = write(tmp_path, BRANCHES, "packed.py"), tmp_path / "runs"
  done = submit(spec, out)
  assert done.returncode == 0, done.stdout + done.stderr
  for cell in select(spec):
    begun = (cell.config.train.branch_step or 0) + 1
    assert [step for step, _ in curve(RunDir.of(out, cell))] == list(
        range(begun, cell.config.train.steps + 1))


def trainer(selection, out):
  return subprocess.Popen([sys.executable, "-m", "moe_jax.train", f"--config={selection}",
                           f"--out={out}"], cwd=ROOT, env=os.environ | ENVIRONMENT, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.slow
def test_killed_or_stopped_a_population_goes_on_bit_for_bit(tmp_path):
  """Killed while it saves, its members stand at different steps."""
  spec = write(tmp_path, SWEEP.replace("1e30", "3e-3"), "packed.py")
  cells = select(spec)[:3]
  selection = f"{spec}:" + ",".join(cell.name for cell in cells)
  undisturbed, out = tmp_path / "undisturbed", tmp_path / "runs"
  process = trainer(selection, undisturbed)
  assert process.communicate(timeout=PATIENCE) and process.returncode == 0

  def saved():
    return sum(file.name.isdecimal() for file in pathlib.Path(out).glob("packed/*/checkpoints/*"))

  for number, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, EXIT_PREEMPTED), (0, 0)):
    before, process = saved(), trainer(selection, out)
    while number and process.poll() is None and saved() <= before:
      time.sleep(0.002)
    if number:
      process.send_signal(number)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == code, err
    if number == signal.SIGTERM:
      states = {RunDir.of(out, cell).read_status()["state"] for cell in cells}
      assert "preempted" in states and states <= {"preempted", "finished"}
  for cell in cells:
    assert curve(RunDir.of(out, cell)) == curve(RunDir.of(undisturbed, cell))


@pytest.mark.slow
def test_cells_of_one_shape_compile_once(tmp_path):
  """Each in a process of its own: the second finds every program in the cache."""
  spec, out = write(tmp_path, SWEEP.replace("1e30", "3e-3"), "packed.py"), tmp_path / "runs"
  programs = []
  for cell in select(spec)[:2]:
    process = trainer(f"{spec}:{cell.name}", out)
    assert process.communicate(timeout=PATIENCE) and process.returncode == 0
    programs.append({file.name for file in (out / "_compilation_cache").iterdir()
                     if file.name.endswith("-cache")})
  assert programs[0] and programs[0] == programs[1]
