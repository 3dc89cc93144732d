"""The plan gate: what plans say does not fit is not submitted, and the rest has a price."""

import dataclasses
import itertools
import re
import subprocess

import pytest
from etils import epath

from launch import gate
from launch.backends import slurm
from launch.jobs import jobs_of
from moe_jax.errors import FieldError
from moe_jax.files import write_json
from moe_jax.grid import select
from moe_jax.plan import cells, topology
from tests.experiment_files import BASE, run_module, write, write_tiny
from tests.launch.branch_test import SOURCE

V6E = topology.parse("v6e-8")
_GIB = 2**30
_FITS = {"memory": {"peak": 15 * _GIB}, "seconds": 1.5,
         "compile_seconds": 2.0}
_PLANNING = ("python", "-m", "moe_jax.plan")


def _know(job, result, out, config=None):
  write_json(cells._cached(config or job.cell.config, V6E, out), result)


@pytest.fixture
def out(tmp_path):
  return str(tmp_path / "runs")


@pytest.fixture
def jobs(tmp_path, out):
  return jobs_of(select(write_tiny(tmp_path, seeds=3)), out, [])


def test_the_bill_is_that_of_the_planned_steps(jobs, out):
  for job in jobs:
    _know(job, _FITS, out)
  hours = 3 * 20 * 1.5 * 8 / 3600
  (line,) = gate.notes(jobs, V6E, out, None, _PLANNING)
  assert line == (f"3 planned cells take an estimated {hours:,.4g} chip-hours of v6e-8: "
                  f"${hours * 2.7:.2f} at $2.7 a chip-hour, on demand, by a 2026 catalogue "
                  "snapshot")
  (line,) = gate.notes(jobs, V6E, out, 1.0, _PLANNING)
  assert line.endswith(f"${hours:.2f} at $1 a chip-hour, as given")


def test_cells_without_a_plan_are_said_with_the_command_that_makes_it(jobs, out):
  _know(jobs[0], _FITS, out)
  bill, missing, command = gate.notes(jobs, V6E, out, None, _PLANNING)
  assert bill.startswith("1 planned cells take")
  assert missing.startswith("2 of 3 cells have no plan for v6e-8, so whether they fit")
  assert command == "  python -m moe_jax.plan"
  other = topology.parse("v6e-4")  # on which the same cells are not known
  assert "3 of 3 cells have no plan for v6e-4" in gate.notes(jobs, other, out, None, _PLANNING)[0]


def test_what_does_not_fit_is_refused_with_what_would(jobs, out):
  _know(jobs[0], _FITS, out)
  for job in jobs[1:]:
    _know(job, {"error": "RESOURCE_EXHAUSTED", "hbm_needed": 40.5 * _GIB}, out)
  wanted = f"topology='v6e-8': {BASE}-s1 does not fit: needs 40.50 GiB of 31.25, 9.25 GiB over"
  with pytest.raises(FieldError, match=wanted + r" \(and 1 more\); --plan=ignore"):
    gate.notes(jobs, V6E, out, None, _PLANNING)
  (flags, slow), (others, fast) = itertools.islice(
      cells.changes_that_save(jobs[1].cell.config, V6E), 2)
  _know(jobs[1], _FITS, out, slow)
  with pytest.raises(FieldError, match=f"; fits with {flags}, 1500.0 ms a step "):
    gate.notes(jobs, V6E, out, None, _PLANNING)
  _know(jobs[1], _FITS | {"seconds": 0.5}, out, fast)  # the fastest of what is known
  with pytest.raises(FieldError, match=f"; fits with {others}, 500.0 ms a step "):
    gate.notes(jobs, V6E, out, None, _PLANNING)


def test_a_program_that_compiles_and_is_too_large_is_refused_too(jobs, out):
  _know(jobs[0], _FITS | {"memory": {"peak": 33 * _GIB}}, out)
  with pytest.raises(FieldError, match="needs 33.00 GiB of 31.25"):
    gate.notes(jobs, V6E, out, None, _PLANNING)


def test_a_mesh_that_is_not_the_slices_needs_no_plan_to_be_refused(jobs, out):
  job = jobs[0]
  config = dataclasses.replace(job.cell.config, train=dataclasses.replace(
      job.cell.config.train, batch_size=12))
  job = dataclasses.replace(job, cell=dataclasses.replace(job.cell, config=config))
  with pytest.raises(FieldError, match="failed: config.train.batch_size=12: "):
    gate.notes([job], V6E, out, None, _PLANNING)


def test_a_branch_costs_the_steps_that_it_takes_itself(tmp_path, out):
  jobs = jobs_of(select(write(tmp_path, SOURCE, "budgets.py")), out, [])
  for job in jobs:
    _know(job, _FITS, out)
  steps = sum(job.cell.config.train.steps - (job.cell.config.train.branch_step or 0)
              for job in jobs)
  (line,) = gate.notes(jobs, V6E, out, None, _PLANNING)
  assert f"an estimated {steps * 1.5 * 8 / 3600:,.4g} chip-hours" in line


def test_what_cannot_be_split_over_the_gpus_is_refused(jobs):
  gate.require_mesh(jobs, 8)
  gate.require_mesh(jobs, None)
  with pytest.raises(FieldError, match="config.train.batch_size=8: .* each of the 16 devices"):
    gate.require_mesh(jobs, slurm.Options(nodes=2, gpus_per_node=8).devices)
  assert slurm.Options(gpus_per_node=0, tasks_per_node=4).devices is None


# As typed


_GCLOUD = ["--backend=gcloud", "--project=p", "--zones=us-east5-b", "--topology=v6e-8"]


def _submit(spec, out, *arguments):
  return run_module("-m", "launch.submit", f"--config={spec}", f"--out={out}", *_GCLOUD,
                    *arguments)


def test_submit_refuses_in_one_line_unless_told_otherwise(tmp_path, out):
  spec = write_tiny(tmp_path, seeds=2)
  jobs = jobs_of(select(spec), out, [])
  _know(jobs[1], {"error": "RESOURCE_EXHAUSTED", "hbm_needed": 40 * _GIB}, out)
  done = _submit(spec, out)
  assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
  assert f"--topology='v6e-8': {BASE}-s1 does not fit: needs 40.00 GiB of 31.25" in done.stderr
  assert not (tmp_path / "runs" / "tiny").exists()
  done = _submit(spec, out, "--plan=ignore", "--dry_run")
  assert (done.returncode, done.stderr) == (0, "")


def test_the_command_it_names_is_the_one_that_plans(tmp_path, out):
  spec = write_tiny(tmp_path, seeds=1)
  done = _submit(spec, out, "--dry_run", "--config.train.batch_size=16", "--slices_per_run=2",
                 "--max_cost_usd=50")
  assert "# all slices end before spending exceeds $50\n" in done.stdout
  (command,) = re.findall("^#   (python .*)$", done.stdout, re.MULTILINE)
  assert command == (f"python -m moe_jax.plan --config={spec} --topology=v6e-8 --slices=2 "
                     f"--out={out} --config.train.batch_size=16")


def test_plans_that_cannot_be_made_stop_the_submission(tmp_path, monkeypatch):
  asked = []

  def run(command, check):
    asked.append(command)
    return subprocess.CompletedProcess(command, 2)

  monkeypatch.setattr(gate.subprocess, "run", run)
  with pytest.raises(FieldError, match="plan='make': moe_jax.plan ended with exit code 2"):
    gate.make(("python", "-m", "moe_jax.plan", "--x"))
  assert asked[0][1:] == ("-m", "moe_jax.plan", "--x")


@pytest.mark.parametrize("arguments, message", [
    (["--usd_per_chip_hour=-1"], "--usd_per_chip_hour=-1.0: must be 0 or more"),
    (["--max_cost_usd=0"], "--max_cost_usd=0.0: must be above 0"),
    (["--max_cost_usd=5", "--delete_when_done=false"],
     "--delete_when_done=False: contradicts --max_cost_usd: without a live launcher"),
    (["--max_cost_usd=nan"], "--max_cost_usd='nan': must be a finite number")])
def test_bad_money_is_one_line(tmp_path, out, arguments, message):
  done = _submit(write_tiny(tmp_path), out, *arguments)
  assert (done.returncode, done.stderr.count("\n")) == (2, 1)
  assert message in done.stderr


def test_a_text_that_the_machines_would_not_find_is_not_submitted(tmp_path, out):
  spec, corpus = write_tiny(tmp_path), "--config.data.corpus=sotu:0.5,stories:0.5"
  done = _submit(spec, out, "--dry_run", corpus)
  assert (done.returncode, done.stderr) == (2, "error: --config.data.corpus='stories': is neither "
                                            f"built in nor in {out}/_data\n")
  write_json(epath.Path(out) / "_data" / "stories" / "dataset" / "corpus.json", {})
  assert _submit(spec, out, "--dry_run", corpus).returncode == 0


def test_a_branch_without_its_trunk_is_not_submitted(tmp_path, out):
  spec = write(tmp_path, SOURCE, "budgets.py")
  name = select(spec)[0].name
  done = _submit(f"{spec}:{name}", out, "--dry_run")
  assert (done.returncode, done.stderr.count("\n")) == (2, 1)
  assert "which has not saved step 8 and is not part of this submission" in done.stderr
  assert _submit(spec, out, "--dry_run").returncode == 0
