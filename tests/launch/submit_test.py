"""The two commands as a user types them: what they print, what they refuse."""

import json
import shlex
import subprocess
import sys

import pytest

from moe_jax.grid import select
from moe_jax.run_dir import RunDir
from tests.experiment_files import BASE, ROOT, run_module, write, write_tiny


@pytest.fixture
def spec(tmp_path):
  return write_tiny(tmp_path)


def _finish(out, spec, changes=None):
  """Leaves a finished run of the first cell."""
  cell = select(f"{spec}:{BASE}", changes)[0]
  run_dir = RunDir.of(out, cell)
  run_dir.claim(cell)
  run_dir.write_status({"state": "finished", "step": 20, "steps": 20, "loss": 1.5,
                        "tokens_per_second": 1e4, "error": None})


def commands(script):
  """The lines of a dry run that a shell would run."""
  return [line for line in script.splitlines() if not line.startswith("#")]


def test_a_dry_run_shows_each_cells_exact_size_and_residual(tmp_path):
  source = """
from moe_jax.config import Architecture, RunConfig
from moe_jax.grid import Grid

RECIPE = RunConfig(arch=Architecture(n_layers=1, d_model=16, d_expert=8, n_exp=4, n_topk=2,
                                     n_heads=2))


def get_grid():
  return Grid("sized", RECIPE, (RECIPE,), n_total=2_700)
"""
  spec = write(tmp_path, source, "sized.py")
  done = run_module("-m", "launch.submit", f"--config={spec}", "--dry_run")
  # By hand: 4*16*16 attention + 2*8 its norms + 2*16 norms + 16*4 router + 4*3*16*8 experts
  # + 16 final norm = 2688; of them 2*3*16*8 idle.
  assert done.stdout.splitlines()[1].split() == [
      "#", "l1-d16-f8-e4-k2", "2,688", "-4444", "ppm", "1,920", "2", "2"]


def test_a_dry_run_prints_the_trainers_commands_and_writes_nothing(tmp_path, spec):
  out = tmp_path / "my runs"
  done = run_module("-m", "launch.submit", f"--config={spec}", f"--out={out}", "--dry_run",
                    "--config.train.learning_rate=0.5")
  assert (done.returncode, done.stderr) == (0, "")
  assert [shlex.split(line) for line in commands(done.stdout)] == [
      [sys.executable, "-m", "moe_jax.train", f"--config={spec}:{cell}", f"--out={out}",
       "--config.train.learning_rate=0.5"] for cell in (BASE, f"{BASE}-s1")]
  assert not out.exists()


def test_a_dry_run_says_what_is_finished(tmp_path, spec):
  _finish(tmp_path / "runs", spec)
  done = run_module("-m", "launch.submit", f"--config={spec}", f"--out={tmp_path / 'runs'}",
                    "--dry_run")
  _, _, _, first, second = done.stdout.splitlines()  # after a head and a shape for each cell
  assert first == f"# {BASE} is finished"
  assert f"{BASE}-s1" in second


def test_one_cell_can_be_submitted(tmp_path, spec):
  done = run_module("-m", "launch.submit", f"--config={spec}:{BASE}-s1", "--dry_run",
                    f"--out={tmp_path / 'runs'}")
  assert len(commands(done.stdout)) == 1
  assert f"--config={spec}:{BASE}-s1" in done.stdout


@pytest.mark.parametrize("arguments, message", [
    (["--config.arch.n_topk=9"], "--config.arch.n_topk=9: must be at most n_exp, which is 4"),
    (["--config.train.stepz=9"], "did you mean 'config.train.steps'"),
    (["--config.seed_init=1"], "two cells have this name"),
    (["--config.arch.d_model=33"], "--config.arch.d_model=33: must be a multiple of n_heads"),
    (["--backend=locl"], "--backend='locl': must be gcloud or gke or local or slurm"),
    (["--parallel=0"], "--parallel=0"),
    (["--paralel=2"], "--paralel: no such flag; did you mean 'parallel'"),
])
def test_bad_input_is_one_line_before_anything_is_written(tmp_path, spec, arguments, message):
  done = run_module("-m", "launch.submit", f"--config={spec}", f"--out={tmp_path / 'runs'}",
                    *arguments)
  assert done.returncode == 2
  assert message in done.stderr
  assert done.stderr.count("\n") == 1
  assert done.stdout == ""
  assert not (tmp_path / "runs").exists()


def test_a_run_directory_of_another_identity_stops_the_launch_before_it_begins(tmp_path, spec):
  out = tmp_path / "runs"
  _finish(out, spec)
  write_tiny(tmp_path, steps=30)
  done = run_module("-m", "launch.submit", f"--config={spec}", f"--out={out}")
  assert done.returncode == 2
  assert done.stderr == (f"error: --out='{out}/tiny/{BASE}': holds a run of another identity: "
                         "train.steps is 30 here and 20 there\n")
  assert [folder.name for folder in (out / "tiny").iterdir()] == [BASE]


@pytest.mark.parametrize("command, flag", [("launch.submit", "--parallel:"),
                                           ("launch.submit", "--[no]dry_run"),
                                           ("launch.submit", "--max_cost_usd:"),
                                           ("launch.status", "--[no]json:")])
def test_help_lists_the_flags(command, flag):
  done = run_module("-m", command, "--help")
  for name in ("--config:", "--out:", flag):
    assert name in done.stdout


# launch.status


def test_status_prints_a_row_for_each_cell_run_or_not(tmp_path, spec):
  _finish(tmp_path / "runs", spec)
  done = run_module("-m", "launch.status", f"--config={spec}", f"--out={tmp_path / 'runs'}")
  assert (done.returncode, done.stderr) == (0, "")
  head, first, second, summary = done.stdout.splitlines()
  assert first.split()[:1] + first.split()[3:6] == [BASE, "finished", "20/20", "1.5000"]
  assert second.split()[:1] + second.split()[3:] == [f"{BASE}-s1", "pending", "0/20"]
  assert summary == "2 cells: 1 finished, 1 pending"


def test_status_without_an_experiment_finds_the_runs(tmp_path, spec):
  _finish(tmp_path / "runs", spec)
  done = run_module("-m", "launch.status", f"--out={tmp_path / 'runs'}", "--json")
  (row,) = json.loads(done.stdout)
  assert (row["experiment"], row["cell"], row["state"]) == ("tiny", BASE, "finished")
  assert {"n_total", "n_active", "identity", "step", "steps", "loss", "tokens_per_second",
          "heartbeat_age", "error"} <= set(row)


@pytest.mark.parametrize("arguments, message", [
    ([], "holds no runs"),
    (["--config.train.steps=3"], "--config.train.steps='3': needs --config=FILE"),
    (["--config=nowhere.py"], "no such experiment file"),
])
def test_status_refuses_in_one_line(tmp_path, arguments, message):
  done = run_module("-m", "launch.status", f"--out={tmp_path / 'runs'}", *arguments)
  assert done.returncode == 2
  assert message in done.stderr
  assert done.stderr.count("\n") == 1


def test_a_reader_that_stops_early_is_no_error(tmp_path):
  spec = write_tiny(tmp_path, seeds=600)
  done = subprocess.run(
      ["bash", "-c", f"{sys.executable} -m launch.status --config={spec} | head -n 1"],
      cwd=ROOT, capture_output=True, text=True, timeout=60)
  assert done.stdout.startswith("cell")
  assert done.stderr == ""
