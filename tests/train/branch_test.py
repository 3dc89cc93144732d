"""A branch is bitwise the run done alone, tells where it came from, and refuses a wrong trunk."""

import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from moe_jax import config as config_lib
from moe_jax.config import Architecture, ExecutionConfig, RunConfig, identity_hash
from moe_jax.errors import FieldError
from moe_jax.evaluate.results import rows_of
from moe_jax.fields import override
from moe_jax.grid import Cell, Grid, trunk_and_branches
from moe_jax.mesh import make_mesh
from moe_jax.run_dir import RunDir
from moe_jax.train import loop, member
from moe_jax.train.checkpoint import restore_step
from moe_jax.train.checkpoint_files import checkpoint_steps
from moe_jax.train.checkpoint_format import CheckpointError
from moe_jax.train.step import abstract_state
from moe_jax.train.trunk import find_trunk

RECIPE = override(RunConfig(
    arch=Architecture(n_layers=1, d_model=16, d_expert=8, n_exp=4, n_topk=2, n_heads=2),
    execution=ExecutionConfig(log_every=1, checkpoint_every=4, keep_checkpoints=1)), {
        "model.compute_dtype": "float32", "data.seq_len": 16, "train.steps": 16,
        "train.warmup_steps": 2, "train.batch_size": 8, "train.decay_fraction": 0.25})
GRID = Grid("budgets", RECIPE, trunk_and_branches(RECIPE, RECIPE, shares=(0.5, 1.0)))
# The trunk and the runs without one take minutes on a small machine.
pytestmark = pytest.mark.slow
CELLS = [Cell(GRID.name, "", *named) for named in zip(GRID.names, GRID.cells, strict=True)]


def alone(cell):
  """The same run without its trunk."""
  return dataclasses.replace(cell, name="alone" + cell.name, config=override(
      cell.config, {"train.branch_from": None}))


@pytest.fixture(scope="module")
def out(tmp_path_factory):
  """The trunk and its first branch, trained."""
  folder = tmp_path_factory.mktemp("branches")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop, "use_compilation_cache", lambda out: None)  # keep that of the tests
    for cell in CELLS[:2]:
      assert loop.train(cell, folder) == 0
    yield folder


@pytest.fixture
def trunk_alone(out, tmp_path):
  """A new place with the trunk in it."""
  (tmp_path / "_data").symlink_to(out / "_data")
  shutil.copytree(RunDir.of(out, CELLS[0]).path, RunDir.of(tmp_path, CELLS[0]).path)
  return tmp_path


def final_state(out, cell):
  config = cell.config
  wanted = abstract_state(config, make_mesh(config))
  state = restore_step(RunDir.of(out, cell), config.train.steps, wanted).state
  return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]


def curve(out, cell):
  return [{name: value for name, value in record.items()
           if name not in ("tokens_per_second", "mfu")}
          for record in RunDir.of(out, cell).read_metrics()]


def test_the_trunk_keeps_its_branch_points_beside_the_latest(out):
  """They are no multiples of checkpoint_every, and one latest checkpoint is kept."""
  assert checkpoint_steps(RunDir.of(out, CELLS[0])) == [6, 12]


@pytest.mark.parametrize("cell", CELLS[1:], ids=["half", "whole"])
def test_a_branch_is_bitwise_the_run_done_alone(out, cell):
  step = cell.config.train.branch_step
  for each in (cell, alone(cell)):
    assert loop.train(each, out) == 0
  straight = curve(out, alone(cell))
  assert [record["step"] for record in curve(out, cell)] == list(
      range(step + 1, cell.config.train.steps + 1))
  assert curve(out, cell) == straight[step:]
  assert curve(out, CELLS[0])[:step] == straight[:step]
  assert final_state(out, cell) == final_state(out, alone(cell))


def test_a_branch_tells_where_it_came_from(out):
  cell = CELLS[1]
  run_dir = RunDir.of(out, cell)
  record = {"run": f"budgets/{CELLS[0].name}", "identity": identity_hash(CELLS[0].config),
            "step": 6}
  assert json.loads((run_dir.path / "config.json").read_text())["branched_from"] == record
  assert run_dir.read_status()["branched_from"] == record
  assert RunDir.of(out, CELLS[0]).read_status()["branched_from"] is None
  run_dir.write_eval("heldout", {"step": 8, "identity": identity_hash(cell.config)})
  (row,) = rows_of(run_dir)
  assert (row["trunk_identity"], row["trunk_step"]) == (record["identity"], 6)
  assert row["tokens"] == 8 * cell.config.batch_tokens  # the trunk's are its own too


def test_a_branch_under_way_goes_on_without_its_trunk(out, trunk_alone):
  cell = CELLS[1]
  shutil.copytree(RunDir.of(out, cell).path, RunDir.of(trunk_alone, cell).path)
  run_dir = RunDir.of(trunk_alone, cell)
  run_dir.write_status(run_dir.read_status() | {"state": "preempted"})
  shutil.rmtree(RunDir.of(trunk_alone, CELLS[0]).path)
  assert loop.train(cell, trunk_alone) == 0
  assert run_dir.read_status()["branched_from"]["step"] == 6


def test_runs_of_a_version_that_hashed_otherwise_go_on(out, tmp_path, monkeypatch):
  (tmp_path / "_data").symlink_to(out / "_data")
  monkeypatch.setattr(loop, "use_compilation_cache", lambda out: None)
  with monkeypatch.context() as older:
    for module in (config_lib, member):
      older.setattr(module, "identity_hash", lambda config: 12 * "0")
    assert loop.train(CELLS[0], tmp_path) == 0
  trunk = RunDir.of(tmp_path, CELLS[0])
  assert trunk.read_identity() == 12 * "0"
  trunk.write_status(trunk.read_status() | {"state": "preempted"})
  for cell in CELLS[:2]:  # it and its branch
    assert loop.train(cell, tmp_path) == 0


@pytest.mark.parametrize("reference", ["budgets/{}", "{out}/budgets/{}"])
def test_a_trunk_of_another_experiment_or_by_path(out, reference):
  value = reference.format(CELLS[0].name, out=out) + "@12"
  cell = dataclasses.replace(CELLS[2], experiment="elsewhere", config=override(
      CELLS[2].config, {"train.branch_from": value}))
  assert find_trunk(out, cell).record == {
      "run": f"budgets/{CELLS[0].name}", "identity": identity_hash(CELLS[0].config), "step": 12}


@pytest.mark.parametrize("changes, problem", [
    ({"train.branch_from": CELLS[0].name + "@7", "train.steps": 10},
     "the trunk has no checkpoint of step 7; it has those of 6, 12"),
    ({"train.branch_from": "absent@6"}, "there is no run at .*/budgets/absent: train the trunk"),
    ({"train.learning_rate": 0.5}, "differs in more than its steps and its decay: "
     "train.learning_rate is 0.5 here and 0.001 there"),
    ({"train.branch_from": CELLS[0].name + "@13", "train.steps": 18}, "step 13 lies behind the "
     "trunk's stable phase, which ends at step 12 of 12"),
])
def test_a_wrong_trunk_is_refused_before_anything_is_written(trunk_alone, changes, problem):
  cell = dataclasses.replace(CELLS[1], name="wrong", config=override(CELLS[1].config, changes))
  with pytest.raises(FieldError, match=problem) as caught:
    loop.train(cell, trunk_alone)
  assert caught.value.field == "config.train.branch_from"
  assert not RunDir.of(trunk_alone, cell).path.exists()


def test_a_damaged_branch_point_is_not_used(trunk_alone):
  folder = pathlib.Path(RunDir.of(trunk_alone, CELLS[0]).checkpoints, "6", "params")
  file = max((path for path in folder.rglob("*") if path.is_file()),
             key=lambda path: path.stat().st_size)
  content = bytearray(file.read_bytes())
  content[len(content) // 2] ^= 1
  file.write_bytes(content)
  with pytest.raises(CheckpointError, match="checkpoints/6 is damaged: params/.* does not match"):
    loop.train(CELLS[1], trunk_alone)
