"""Each member of a population is the run done alone; what ends one does not touch the others."""

import pathlib
import shutil

import jax
import numpy as np
import pytest

from moe_jax.config import identity_hash
from moe_jax.errors import FieldError
from moe_jax.fields import override
from moe_jax.grid import Cell, Grid, cell_name
from moe_jax.mesh import make_mesh
from moe_jax.population import shape_of
from moe_jax.run_dir import EXIT_DIVERGED, RunDir
from moe_jax.train import loop, population
from moe_jax.train import step as step_lib
from moe_jax.train.checkpoint import restore_step
from moe_jax.train.checkpoint_files import checkpoint_steps
from moe_jax.train.population import Population, compiled_step
from tests.small import small_config
from tests.train.step_test import batch_of

STEPS, EVERY = 8, 4
DIFFERENCES = ({"seed_init": 1, "train.learning_rate": 3e-3},
               {"seed_init": 2, "train.learning_rate": 1e-3, "moe.balance_coef": 0.1},
               {"seed_init": 1, "train.learning_rate": 6e-3, "train.weight_decay": 0.0,
                "moe.z_coef": 0.0, "moe.bias_update_rate": 0.01, "train.warmup_steps": 3,
                "train.decay_fraction": 0.5, "train.final_learning_rate_fraction": 0.1,
                "seed_data": 5})
RECIPE = small_config(train={"steps": STEPS, "warmup_steps": 2}, moe={"capacity_factor": 1.0},
                      execution={"checkpoint_every": EVERY, "log_every": 1, "population": 8})
ALL_ELSE = {"dispatch": "dropless", "router": "sigmoid", "jitter": 0.1}  # what RECIPE has not


def members(recipe, differences=DIFFERENCES):
  return [override(recipe, changes) for changes in differences]


def cells_of(differences=DIFFERENCES, recipe=RECIPE):
  grid = Grid("together", recipe, tuple(members(recipe, differences)))
  return [Cell(grid.name, "", *named) for named in zip(grid.names, grid.cells, strict=True)]


@pytest.fixture(autouse=True, scope="module")
def one_device():
  """A machine with one device, and the tests' own cache of compiled programs."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))
    patch.setattr(loop, "use_compilation_cache", lambda out: None)
    yield


# one step, and twenty


def curves(configs, together, n_steps):
  """[member][step] -> metrics, and the states after the first step and the last."""
  mesh = make_mesh(configs[0], jax.devices()[:1])
  groups = [configs] if together else [[config] for config in configs]
  metrics, first, last = [], [], []
  for group in groups:
    population = Population(group, mesh)
    state = population.join([step_lib.init_state(config, mesh) for config in group])
    steps = []
    for n in range(n_steps):
      before = jax.tree.leaves(state)
      state, values = population.step(state, population.put_batch(
          [batch_of(config, 100 * config.seed_data + n % 4) for config in group]))
      steps.append(population.values(values))
      if n == 0:
        assert all(leaf.is_deleted() for leaf in before)  # later ones are in use, as `first`
        first += [jax.device_get(population.state_of(state, i)) for i in range(len(group))]
    metrics += [[step[i] for step in steps] for i in range(len(group))]
    last += [jax.device_get(population.state_of(state, i)) for i in range(len(group))]
  return metrics, first, last


@pytest.fixture
def batched(monkeypatch):
  """Members are batched by vmap, as on an accelerator, with this platform's products."""
  compiled_step.cache_clear()
  monkeypatch.setattr(population, "platform_of", lambda mesh: "gpu")
  yield
  compiled_step.cache_clear()


@pytest.mark.parametrize("moe, how", [
    ({"capacity_factor": 1.0}, "one after another"),
    ({"capacity_factor": 1.0}, "batched"),
    pytest.param({"capacity_factor": 1.0, "router": "sigmoid", "jitter": 0.1}, "one after another",
                 marks=pytest.mark.slow),
    pytest.param(ALL_ELSE, "one after another", marks=pytest.mark.slow),
    pytest.param(ALL_ELSE, "batched", marks=pytest.mark.slow)],
    ids=["softmax", "softmax-batched", "sigmoid-jitter", "all-else", "all-else-batched"])
def test_each_member_is_the_run_done_alone(moe, how, request):
  if how == "batched":
    request.getfixturevalue("batched")
  configs = members(small_config(train={"steps": 20, "warmup_steps": 2}, moe=moe))
  together, first, last = curves(configs, True, 20)
  alone, first_alone, last_alone = curves(configs, False, 20)
  for i in range(len(configs)):
    np.testing.assert_allclose(together[i][0]["loss"], alone[i][0]["loss"], rtol=1e-5)
    assert together[i][0]["learning_rate"] == pytest.approx(alone[i][0]["learning_rate"], rel=1e-6)
    for name in ("drop_rate", "max_load", "dead_experts"):  # the routing is the same
      assert together[i][0][name] == pytest.approx(alone[i][0][name], abs=1e-6)
    # What the first step has seen of the gradient, before Adam divides it by its size.
    for name in ("mu", "nu", "router"):
      for ours, theirs in zip(*map(jax.tree.leaves, (first[i][name], first_alone[i][name])),
                              strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    losses = [[step["loss"] for step in run[i]] for run in (together, alone)]
    np.testing.assert_allclose(*losses, rtol=1e-3)
    assert int(last[i]["step"]) == int(last_alone[i]["step"]) == 20
  # What differs between members has an effect: nothing was taken from the first for all.
  assert len({run[5]["loss"] for run in together}) == len(configs)
  assert len({run[0]["learning_rate"] for run in together}) == len(configs)


def test_cells_of_one_shape_share_the_program_alone_and_together():
  mesh = make_mesh(RECIPE, jax.devices()[:1])
  longer = override(RECIPE, {"train.steps": 99, "execution.log_every": 7})
  Population(members(RECIPE)[:1], mesh)
  before = compiled_step.cache_info().misses
  for config in (*members(RECIPE), longer):
    Population([config], mesh)
  assert compiled_step.cache_info().misses == before
  shapes = {shape_of(override(RECIPE, changes)) for changes in (
      {}, {"train.clip_norm": 2.0}, {"train.beta2": 0.9}, {"moe.capacity_factor": 2.0},
      {"train.schedule": "cosine"}, {"execution.remat": "full"}, {"data.seq_len": 8})}
  assert len(shapes) == 7  # what is written into the program


# whole runs


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  out = tmp_path_factory.mktemp("population")
  assert loop.train_together(cells_of(), out) == 0
  return out


def copy_of(trained, tmp_path):
  shutil.copytree(trained / "together", tmp_path / "together")
  (tmp_path / "_data").symlink_to(trained / "_data")
  return tmp_path


def curve(out, cell):
  return [{name: value for name, value in record.items()
           if name not in ("tokens_per_second", "mfu")}
          for record in RunDir.of(out, cell).read_metrics()]


def final_state(out, cell):
  abstract = step_lib.abstract_state(cell.config, make_mesh(cell.config, jax.devices()[:1]))
  state = restore_step(RunDir.of(out, cell), STEPS, abstract).state
  return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]


def interrupt(out, cell, step):
  """As if its process had been killed when `step` was the last that was saved."""
  run_dir = RunDir.of(out, cell)
  for saved in checkpoint_steps(run_dir):
    if saved > step:
      shutil.rmtree(run_dir.checkpoints / str(saved))
      run_dir.checksums(saved).unlink()
  run_dir.write_status(run_dir.read_status() | {"state": "running", "pid": 2**22 + 1})


def test_the_directories_are_those_of_runs_done_alone(trained, tmp_path):
  (tmp_path / "_data").symlink_to(trained / "_data")
  cell = cells_of()[2]
  assert loop.train(cell, tmp_path) == 0
  ours, alone = RunDir.of(trained, cell), RunDir.of(tmp_path, cell)

  def files(run_dir, *suffixes):
    return sorted(str(file.relative_to(run_dir.path)) for file in
                  pathlib.Path(run_dir.path).rglob("*") if file.suffix in suffixes)

  assert files(ours, ".json", ".jsonl") == files(alone, ".json", ".jsonl")
  assert (ours.path / "config.json").read_text() == (alone.path / "config.json").read_text()
  told, told_alone = ours.read_status(), alone.read_status()
  assert told.keys() == told_alone.keys()
  assert (told["state"], told["step"], told["steps"]) == ("finished", STEPS, STEPS)
  ours, alone = curve(trained, cell), curve(tmp_path, cell)
  assert [record["step"] for record in ours] == list(range(1, STEPS + 1))
  for mine, theirs in zip(ours, alone, strict=True):
    assert mine.keys() == theirs.keys()
    assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-3)


def test_members_that_stand_at_different_steps_go_on_bit_for_bit(trained, tmp_path):
  out, (first, second, third) = copy_of(trained, tmp_path), cells_of()
  interrupt(out, first, EVERY)
  interrupt(out, second, STEPS)  # saved its last step and did not come to say so
  shutil.rmtree(RunDir.of(out, third).path)  # not even begun
  assert loop.train_together([first, second, third], out) == 0
  for cell in (first, second, third):
    assert curve(out, cell) == curve(trained, cell)
    assert final_state(out, cell) == final_state(trained, cell)


def test_a_member_goes_on_alone_and_a_run_begun_alone_goes_on_in_a_population(trained, tmp_path):
  out, (first, second, third) = copy_of(trained, tmp_path), cells_of()
  interrupt(out, first, EVERY)
  assert loop.train(first, out) == 0
  shutil.rmtree(RunDir.of(out, second).path)
  assert loop.train(second, out) == 0
  for cell in (first, second, third):
    interrupt(out, cell, EVERY)
  assert loop.train_together([first, second, third], out) == 0
  for cell in (first, second, third):
    for mine, theirs in zip(curve(out, cell), curve(trained, cell), strict=True):
      assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-3)


def test_a_member_that_diverges_ends_alone(trained, tmp_path):
  (tmp_path / "_data").symlink_to(trained / "_data")
  bad = {"train.learning_rate": 1e30}
  cells = cells_of((DIFFERENCES[0], bad, DIFFERENCES[2]))
  assert loop.train_together(cells, tmp_path) == EXIT_DIVERGED
  states = [RunDir.of(tmp_path, cell).read_status() for cell in cells]
  assert [status["state"] for status in states] == ["finished", "diverged", "finished"]
  assert "stopped; the last good checkpoint is" in states[1]["error"]
  assert states[1]["step"] < STEPS
  for cell in (cells[0], cells[2]):
    assert curve(tmp_path, cell) == curve(trained, cell)


def test_a_member_whose_checkpoints_are_all_damaged_ends_alone(trained, tmp_path):
  out, (first, second, _) = copy_of(trained, tmp_path), cells_of()
  for step in checkpoint_steps(RunDir.of(out, first)):
    RunDir.of(out, first).checksums(step).write_text("{}")
  interrupt(out, first, STEPS)
  interrupt(out, second, EVERY)
  assert loop.train_together([first, second], out) == 1
  states = [RunDir.of(out, cell).read_status() for cell in (first, second)]
  assert [status["state"] for status in states] == ["failed", "finished"]
  assert "no checkpoint in" in states[0]["error"]
  assert RunDir.of(out, first).has_checkpoint(STEPS)  # nothing was deleted


# what is refused


def test_cells_of_different_shapes_are_refused(tmp_path):
  cells = cells_of(({}, {"train.beta2": 0.9}))
  with pytest.raises(FieldError, match=r"execution.population=8: trains cells of one shape.*beta2 "
                     r"is 0.95 in .* and 0.9 in "):
    loop.train_together(cells, tmp_path)
  assert not list(tmp_path.iterdir())


def test_a_mesh_of_several_devices_is_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(loop, "make_mesh", make_mesh)
  recipe = override(RECIPE, {"execution.mesh.data": 8})
  with pytest.raises(FieldError, match="execution.population=2: trains on one device, and the "
                     "mesh has 8"):
    loop.train_together(cells_of(DIFFERENCES[:2], recipe), tmp_path)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [0, -3])
def test_a_population_has_at_least_one_member(number):
  with pytest.raises(FieldError, match=f"execution.population={number}: must be at least 1"):
    override(RECIPE, {"execution.population": number})


def test_population_is_no_part_of_the_identity():
  alone = override(RECIPE, {"execution.population": 1})
  assert identity_hash(alone) == identity_hash(RECIPE)
  assert cell_name(alone, RECIPE) == cell_name(RECIPE, RECIPE)
