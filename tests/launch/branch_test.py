"""A trunk and its branches in one launch: each branch waits for the checkpoint it begins with."""

import pytest

from launch.jobs import plan, read_launch
from launch.state import states_of
from moe_jax.errors import FieldError
from moe_jax.grid import select
from moe_jax.run_dir import RunDir
from tests.experiment_files import write, write_tiny
from tests.launch import submitter
from tests.launch.local_test import _submit

# The branch is listed first: it must wait all the same.
SOURCE = '''
from moe_jax.config import *
from moe_jax.grid import Grid, trunk_and_branches

RECIPE = RunConfig(
    arch=Architecture(n_layers=1, d_model=16, d_expert=8, n_exp=4, n_topk=2, n_heads=2),
    train=TrainConfig(steps=20, warmup_steps=2), execution=ExecutionConfig(checkpoint_every=5))


def get_grid():
  trunk, *branches = trunk_and_branches(RECIPE, RECIPE, (0.5, 1.0))
  return Grid("budgets", RECIPE, (*branches, trunk))
'''


@pytest.fixture
def spec(tmp_path):
  return write(tmp_path, SOURCE, "budgets.py")


def _launches(spec, out):
  return [read_launch(RunDir.of(out, cell)) for cell in select(spec)]


def test_plans_put_trunks_before_their_branches(spec, tmp_path):
  assert [job.cell.config.train.branch_step for job in plan(select(spec), tmp_path, [])] == [
      None, 8, 16]


@pytest.mark.parametrize("parallel", [1, 3])
def test_a_branch_waits_for_its_checkpoint_alone(spec, tmp_path, parallel):
  out = tmp_path / "runs"
  assert _submit(spec, out, ["ok", "ok", "slow"], parallel) == 0
  half, whole, trunk = _launches(spec, out)
  assert half.started > trunk.started and whole.started > trunk.started
  if parallel == 3:  # the trunk takes half a second more behind the first branch point
    assert half.started < trunk.ended


def test_branches_of_a_trunk_that_fails_are_not_started(spec, tmp_path, capsys):
  out = tmp_path / "runs"
  assert _submit(spec, out, ["ok", "ok", "crash"]) == 1
  assert [row.state for row in states_of(out, select(spec))] == ["pending", "pending", "failed"]
  said = capsys.readouterr().out
  trunk = select(spec)[2].name
  for step in (8, 16):
    assert (f"-branch{step}: not started: its trunk {trunk} ended before it saved step {step}"
            in said)
  assert _submit(spec, out, ["ok", "ok", "ok"]) == 0


def test_a_branch_of_a_run_elsewhere_is_its_trainers_to_refuse(spec, tmp_path):
  """Nothing in this launch could be waited for."""
  (cell,) = select(f"{spec}:{select(spec)[0].name}")
  (job,) = submitter.jobs_of(f"{spec}:{cell.name}", tmp_path / "runs", ["ok"])
  assert job.missing_trunk() == RunDir(tmp_path / "runs" / "budgets" / select(spec)[2].name)
  assert _submit(f"{spec}:{cell.name}", tmp_path / "runs", ["broken"]) == 1


def test_a_branch_under_way_needs_its_trunk_no_more(spec, tmp_path):
  (job,) = submitter.jobs_of(f"{spec}:{select(spec)[0].name}", tmp_path, ["ok"])
  assert job.missing_trunk() is not None
  (job.run_dir.checkpoints / "9").mkdir(parents=True)
  assert job.missing_trunk() is None


def test_one_damaged_configuration_stops_no_other_cell(tmp_path, capsys):
  spec, out = write_tiny(tmp_path, seeds=3), tmp_path / "runs"
  first = submitter.jobs_of(spec, out, ["ok"] * 3)[0]
  first.run_dir.path.mkdir(parents=True)
  for text in ('{"config": ', "[]", '{"config": {"arch": 1}}'):
    (first.run_dir.path / "config.json").write_text(text)
    assert len(plan(select(spec), out, [])) == 3
  assert _submit(spec, out, ["ok"] * 3) == 1
  assert [row.state for row in states_of(out, select(spec))] == [
      "damaged", "finished", "finished"]
  assert "config.json" in capsys.readouterr().out.partition("unfinished:")[2]


def test_a_run_of_another_identity_still_stops_the_launch(tmp_path):
  spec, out = write_tiny(tmp_path, seeds=2), tmp_path / "runs"
  here, other = select(spec)
  RunDir.of(out, here).claim(other)
  with pytest.raises(FieldError, match="another identity: seed_init is 0 here and 1 there"):
    plan(select(spec), out, [])
