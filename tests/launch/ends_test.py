"""What a run left: a finished one whose last checkpoint is lost is no finished one."""

import pytest
from etils import epath

from launch import ends
from launch.host.agent import Agent, Pace
from launch.jobs import jobs_of, lost_ends, trained_together
from launch.work import Work, why_ended
from moe_jax.files import write_json
from moe_jax.grid import select
from moe_jax.run_dir import FINISHED
from moe_jax.train import checkpoint_files, checksums
from tests.experiment_files import run_module, write_tiny
from tests.launch.agent_test import _here
from tests.launch.submitter import TRAINER


@pytest.fixture
def jobs(tmp_path):
  """Two finished runs of 20 steps, with the list of checksums that the trainer writes."""
  jobs = jobs_of(select(write_tiny(tmp_path, seeds=2)), str(tmp_path / "runs"), [])
  for job in jobs:
    folder = job.run_dir.checkpoints / "20" / "params"
    folder.mkdir(parents=True)
    (folder / "array").write_text("sixteen bytes ok")
    (folder.parent / "_CHECKPOINT_METADATA").write_text("{}")
    checksums.record(folder.parent, job.run_dir.checksums(20))
    job.run_dir.claim(job.cell)
    job.run_dir.write_status({"state": FINISHED, "step": 20, "steps": 20})
  return jobs


def _cut(run_dir):
  (run_dir.checkpoints / "20" / "params" / "array").write_text("sixteen")


def _remove(run_dir):
  (run_dir.checkpoints / "20" / "params" / "array").unlink()


def _leave_an_older_one(run_dir):
  (run_dir.checkpoints / "20").rename(run_dir.checkpoints / "15")


def _lose_the_list(run_dir):
  run_dir.checksums(20).unlink()


def _spoil_the_list(run_dir):
  write_json(run_dir.checksums(20), {"params/array": 3})


@pytest.mark.parametrize("harm, why", [
    (_cut, "params/array is missing or truncated"),
    (_remove, "params/array is missing or truncated"),
    (_leave_an_older_one, "is that of step 15 of 20"),
    (_lose_the_list, "checksums of its last checkpoint are missing"),
    (_spoil_the_list, "checksums of its last checkpoint are missing or damaged")])
def test_a_lost_end_is_noticed_and_the_trainer_agrees(jobs, harm, why):
  assert trained_together(jobs) == [] and lost_ends(jobs) == []
  whole, harmed = jobs
  harm(harmed.run_dir)
  assert trained_together(jobs) == [(harmed,)]
  (line,) = lost_ends(jobs)
  assert line.startswith(f"{harmed.name} was finished, but ") and why in line
  assert whole.is_finished()
  assert checkpoint_files.lost_end(harmed.run_dir, 20) is not None


def test_checkpoints_that_were_all_deleted_are_no_loss(jobs):
  jobs[0].run_dir.checkpoints.rmtree()
  assert lost_ends(jobs) == [] and jobs[0].is_finished()


def test_submit_tells_of_it(jobs, tmp_path):
  _cut(jobs[1].run_dir)
  done = run_module("-m", "launch.submit", f"--config={tmp_path / 'tiny.py'}",
                    f"--out={tmp_path / 'runs'}", "--dry_run")
  told = [line for line in done.stdout.splitlines() if "was finished, but" in line]
  assert len(told) == 1 and told[0].startswith(f"# {jobs[1].name} was finished, but its last")
  assert f"# {jobs[0].name} is finished" in done.stdout.splitlines()


def test_an_agent_trains_it_again(jobs, tmp_path, capfd):
  """The trainer of this test saves beside: what was lost stays lost, and has a budget."""
  out = str(tmp_path / "runs")
  cells = {job.name: ("python", str(TRAINER), "ok", f"--config={job.cell.selector}",
                      f"--out={out}") for job in jobs}
  todo = Work("s0", "tiny", out, cells, max_failures=2)
  _cut(jobs[1].run_dir)
  assert [why_ended(todo, name) for name in cells] == [FINISHED, None]
  folder = epath.Path(tmp_path / "slice")
  folder.mkdir()
  assert _here(Agent(todo, folder, "0-0", Pace(0.02, 0.02))) == 0
  assert why_ended(todo, jobs[1].name).startswith("given up after 2 failures")
  assert not ends.is_finished(jobs[1].run_dir)
