"""Trunks and branches: what a branch may differ in, and how a grid ties the two together."""

import dataclasses

import pytest

from moe_jax import cli
from moe_jax.branch import require_trunk
from moe_jax.config import (
    Architecture,
    RunConfig,
    TrainConfig,
    config_from_dict,
    identity_hash,
    to_dict,
)
from moe_jax.errors import FieldError
from moe_jax.fields import override
from moe_jax.grid import Grid, select, trunk_and_branches
from tests.experiment_files import write

RECIPE = RunConfig(
    arch=Architecture(n_layers=1, d_model=16, d_expert=8, n_exp=4, n_topk=2, n_heads=2),
    train=TrainConfig(steps=1000, warmup_steps=100))
GRID = Grid("budgets", RECIPE, trunk_and_branches(RECIPE, RECIPE))
TRUNK, QUARTER, HALF, WHOLE = GRID.cells
SOURCE = '''
from moe_jax.config import *
from moe_jax.grid import Grid, trunk_and_branches

RECIPE = RunConfig(
    arch=Architecture(n_layers=1, d_model=16, d_expert=8, n_exp=4, n_topk=2, n_heads=2),
    train=TrainConfig(steps=1000, warmup_steps=100))


def get_grid():
  return Grid("budgets", RECIPE, trunk_and_branches(RECIPE, RECIPE))
'''


def test_one_trunk_serves_three_budgets():
  assert GRID.names == (
      "l1-d16-f8-e4-k2-steps800-decay0", "l1-d16-f8-e4-k2-steps250-branch200",
      "l1-d16-f8-e4-k2-steps500-branch400", "l1-d16-f8-e4-k2-branch800")
  assert [cell.train.steps for cell in GRID.cells] == [800, 250, 500, 1000]
  assert TRUNK.train.decay_fraction == 0 and TRUNK.train.branch_from is None
  assert TRUNK.execution.keep_steps == (200, 400, 800)
  for branch in (QUARTER, HALF, WHOLE):
    assert branch.train.branch_run == GRID.names[0]
    assert branch.train.branch_step == branch.train.stable_steps
    require_trunk(branch, TRUNK)


def test_a_share_without_a_stable_phase_is_refused():
  with pytest.raises(FieldError, match="warmup_steps=100: with 20 steps of decay must fit"):
    trunk_and_branches(RECIPE, RECIPE, shares=(0.1,))


def test_the_identity_tells_the_step_and_not_where_the_trunk_lies():
  elsewhere = override(HALF, {"train.branch_from": "/old/runs/trunk@400"})
  assert identity_hash(elsewhere) == identity_hash(HALF)
  earlier = override(HALF, {"train.branch_from": "trunk@399"})
  alone = override(HALF, {"train.branch_from": None})
  of_another_trunk = override(HALF, {"seed_init": 1})
  assert len({identity_hash(c) for c in (HALF, earlier, alone, of_another_trunk)}) == 4


def test_a_branch_is_stored_and_read_again_and_older_files_have_none():
  assert config_from_dict(to_dict(HALF)) == HALF
  assert config_from_dict(to_dict(TRUNK)) == TRUNK
  before = to_dict(RECIPE)
  del before["train"]["branch_from"], before["execution"]["keep_steps"]
  assert config_from_dict(before) == RECIPE


@pytest.mark.parametrize("value, problem", [
    ("trunk", "must be RUN@STEP"), ("trunk@", "must be RUN@STEP"), ("@5", "must be RUN@STEP"),
    ("trunk@0", "must be RUN@STEP"), ("trunk@1.5", "must be RUN@STEP"),
    ("trunk@99", r"stable phase, from 100 \(the end of the warm-up\) to 800"),
    ("trunk@801", r"stable phase, .* to 800 \(where its decay begins\)"),
])
def test_a_reference_that_names_no_stable_step_is_refused(value, problem):
  with pytest.raises(FieldError, match=f"train.branch_from='{value}': .*{problem}"):
    override(RECIPE, {"train.branch_from": value})


def test_only_wsd_branches():
  with pytest.raises(FieldError, match="branch_from='t@200': needs the schedule 'wsd'"):
    override(RECIPE, {"train.branch_from": "t@200", "train.schedule": "cosine"})


@pytest.mark.parametrize("changes, problem", [
    ({"train.schedule": "cosine"}, "the trunk's schedule is 'cosine'"),
    ({"train.learning_rate": 2e-3, "seed_data": 3},
     r"differs in more than its steps and its decay: train.learning_rate is 0.001 here and "
     r"0.002 there; seed_data is 0 here and 3 there"),
    ({"train.decay_fraction": 0.9, "train.warmup_steps": 0}, "train.warmup_steps is 100 here"),
    ({"train.decay_fraction": 0.75},
     "step 400 lies behind the trunk's stable phase, which ends at step 200 of 800"),
    ({"train.steps": 300}, "step 400 lies behind the trunk's stable phase, .* step 300 of 300"),
    ({"train.branch_from": "seed@400"}, "the trunk is itself a branch and begins at step 400"),
])
def test_a_trunk_that_does_not_fit_is_refused_by_name(changes, problem):
  with pytest.raises(FieldError, match=problem) as caught:
    require_trunk(HALF, override(TRUNK, changes))
  assert caught.value.field == "train.branch_from"


def test_another_execution_final_rate_or_a_longer_trunk_is_no_matter():
  require_trunk(HALF, override(TRUNK, {
      "execution.remat": "full", "train.steps": 5000, "train.decay_fraction": 0.5,
      "train.final_learning_rate_fraction": 0.1, "train.branch_from": "seed@300"}))


def test_a_grid_refuses_a_branch_that_does_not_fit_its_trunk():
  wrong = override(HALF, {"train.weight_decay": 0.3})
  with pytest.raises(FieldError, match="grid.cells='l1-.*-wd0.3-branch400': .*weight_decay"):
    dataclasses.replace(GRID, cells=(TRUNK, wrong))


def test_a_branch_may_name_its_own_experiment_too(tmp_path):
  """`EXPERIMENT/CELL@STEP` is the same trunk: it keeps its checkpoints and comes first."""
  written = [override(cell, {"train.branch_from": f"budgets/{cell.train.branch_from}"})
             for cell in GRID.cells[1:]]
  bare = override(TRUNK, {"execution.keep_steps": ()})
  grid = Grid("budgets", RECIPE, (*written, bare))
  assert sorted(grid.cells, key=identity_hash) == sorted(GRID.cells, key=identity_hash)
  assert set(grid.names) == set(GRID.names)
  renamed = grid.override({"seed_init": 3})
  assert renamed.get_config(renamed.names[0]).train.branch_run == renamed.names[-1]
  spec = write(tmp_path, SOURCE)
  for kept in ("other/trunk@400", "./budgets/trunk@400", "budgets/budgets/trunk@400"):
    (cell,) = select(f"{spec}:{GRID.names[2]}", {"train.branch_from": kept})
    assert cell.config.train.branch_from == kept


# Overrides and selection


def test_under_overrides_branches_follow_their_trunk(tmp_path):
  cells = select(write(tmp_path, SOURCE), {"train.learning_rate": 2e-3})
  assert cells[0].name == "l1-d16-f8-e4-k2-steps800-lr2e-3-decay0"
  assert [cell.config.train.branch_run for cell in cells[1:]] == [cells[0].name] * 3
  assert cells[0].config.execution.keep_steps == (200, 400, 800)


def test_one_cell_alone_is_the_cell_of_the_grid(tmp_path):
  """The launcher selects the grid, the trainer one cell of it: both must mean the same."""
  spec = write(tmp_path, SOURCE)
  for changes in ({}, {"train.learning_rate": 2e-3}):
    for cell in select(spec, changes):
      assert select(cell.selector, changes) == (cell,)


def test_a_reference_on_the_command_line_is_taken_as_it_stands(tmp_path):
  changes = dict(map(cli.parse_override, (
      "--config.train.branch_from=old/run@300", "--config.train.learning_rate=2e-3")))
  (cell,) = select(f"{write(tmp_path, SOURCE)}:{GRID.names[2]}", changes)
  assert cell.config.train.branch_from == "old/run@300"
  assert cell.name == "l1-d16-f8-e4-k2-steps500-lr2e-3-branch300"


def test_one_length_for_branches_of_several_is_refused(tmp_path):
  """They would be one run, and count as three."""
  spec = write(tmp_path, SOURCE)
  for change in ({"train.steps": 1200}, {"train.tokens": 1200 * RECIPE.batch_tokens}):
    with pytest.raises(FieldError, match=r"overrides give grid\.cells='.*-branch400': is the same "
                                         r"run as .*-branch200: they differ only in the step at"):
      select(spec, change)
  (cell,) = select(f"{spec}:{GRID.names[3]}", {"train.steps": 1200})  # one may be longer
  assert (cell.config.train.steps, cell.config.train.branch_step) == (1200, 800)


@pytest.mark.parametrize("change", [{"train.init_from": "old/run@3"}, {"seed_data": 3}], ids=str)
def test_a_cell_alone_is_what_it_is_in_its_grid(tmp_path, change):
  spec = write(tmp_path, SOURCE)
  for cell in select(spec, change):
    assert select(cell.selector, change) == (cell,)


def test_keep_steps_come_from_the_command_line_and_branch_points_stay(tmp_path):
  change = dict([cli.parse_override("--config.execution.keep_steps=50,700")])
  cells = select(write(tmp_path, SOURCE), change)
  assert cells[0].config.execution.keep_steps == (50, 200, 400, 700, 800)
  with pytest.raises(FieldError, match="keep_steps='5,x': must be a whole number, or several"):
    cli.parse_override("--config.execution.keep_steps=5,x")
  with pytest.raises(FieldError, match=r"keep_steps=\(0,\): must be a tuple of steps"):
    override(RECIPE, {"execution.keep_steps": (0,)})


# Warm starts


@pytest.mark.parametrize("reference, run, step, told", [
    ("old/cell@40", "old/cell", 40, "old/cell@40"), ("old/cell@0", "old/cell", 0, "old/cell@0"),
    ("old/cell", "old/cell", None, "old/cell"),
    ("/far/away/old/cell@40", "/far/away/old/cell", 40, "old/cell@40"),
    ("gs://bucket/runs/old/cell", "gs://bucket/runs/old/cell", None, "old/cell")])
def test_the_identity_tells_the_run_that_one_begins_from_and_not_where_it_lies(
    reference, run, step, told):
  config = override(RECIPE, {"train.init_from": reference})
  assert (config.train.init_run, config.train.init_step) == (run, step)
  assert identity_hash(config) == identity_hash(override(RECIPE, {"train.init_from": told}))
  assert identity_hash(config) != identity_hash(RECIPE)
  assert config_from_dict(to_dict(config)) == config


def test_a_cell_follows_the_one_it_begins_from_to_its_new_name(tmp_path):
  source = """
from moe_jax.config import Architecture, RunConfig
from moe_jax.fields import override
from moe_jax.grid import Grid

DENSE = RunConfig(
    arch=Architecture(n_layers=1, d_model=16, d_expert=16, n_exp=1, n_topk=1, n_heads=2))
MIXTURE = override(DENSE, {"arch.n_exp": 4, "arch.n_topk": 2,
                           "train.init_from": "up/l1-d16-f16-e1-k1@1000"})
LAST = override(MIXTURE, {"train.init_from":
                          "up/l1-d16-f16-e4-k2-init-up-l1-d16-f16-e1-k1-1000"})

def get_grid():
  return Grid("up", DENSE, (LAST, DENSE, MIXTURE))
"""
  spec = write(tmp_path, source)
  begin = {cell.name: cell.config.train.init_from for cell in select(spec, {"seed_init": 1})}
  last, dense, mixture = begin
  assert dense == "l1-d16-f16-e1-k1-s1"
  assert begin == {dense: None, mixture: f"up/{dense}@1000", last: f"up/{mixture}"}
  kept = {cell.name: cell.config.execution.keep_steps for cell in select(spec, {"seed_init": 1})}
  assert kept == {dense: (1000,), mixture: (), last: ()}
  (alone,) = select(f"{spec}:{select(spec)[0].name}", {"seed_init": 1})
  assert (alone.name, alone.config.train.init_from) == (last, f"up/{mixture}")
  (told,) = select(f"{spec}:{select(spec)[0].name}", {"train.init_from": "old/run@3"})
  assert told.config.train.init_from == "old/run@3"  # as it stands


@pytest.mark.parametrize("value", ["cell", "cell@5", "old/cell@", "old/cell@x", "old/", "/", ""])
def test_a_reference_to_no_run_is_refused(value):
  with pytest.raises(FieldError, match="init_from='.*': must be RUN or RUN@STEP"):
    override(RECIPE, {"train.init_from": value})
