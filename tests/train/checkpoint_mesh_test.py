"""A model's checkpoint of any mesh is read on any other, whole, in part, in another type."""

import dataclasses
import functools
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from moe_jax.mesh import make_mesh
from moe_jax.run_dir import RunDir
from moe_jax.train import checkpoint_format
from moe_jax.train.checkpoint import Checkpointer, restore_model, restore_step
from moe_jax.train.step import abstract_state
from tests.small import ARCH, MESHES, ONE_DEVICE, small_config
from tests.train.checkpoint_states import assert_same, restore_params

ALL_MESHES = {**MESHES, "one": ONE_DEVICE}
WRITTEN_ON = "data2_fsdp2_expert2"  # in the fast tests: every axis splits something


@functools.cache
def wanted_on(name):
  """The state of a model that has every kind of array, on that mesh."""
  mesh = ALL_MESHES[name]
  config = small_config(dataclasses.replace(ARCH, n_dense_layers=1, n_shared_experts=1),
                        moe={"router": "sigmoid"}, execution={"mesh": mesh})
  return abstract_state(config, make_mesh(config, jax.devices()[:1 if name == "one" else 8]))


@functools.cache
def content():
  """A value for every element, the same whatever the mesh."""
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda leaf: np.asarray(rng.integers(-2**20, 2**20, leaf.shape) / 2**10,
                                              leaf.dtype), wanted_on("one"))


def saved_on(name, folder):
  run_dir = RunDir(epath.Path(folder / name))
  state = jax.tree.map(lambda x, leaf: jax.make_array_from_callback(
      x.shape, leaf.sharding, lambda index: x[index]), content(), wanted_on(name))
  with Checkpointer(run_dir, 1) as checkpointer:
    checkpointer.save(1, state, {"next_index": 1}, {})
  return run_dir


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
  return saved_on(WRITTEN_ON, tmp_path_factory.mktemp("meshes"))


def assert_placed(actual, wanted):
  assert all(jax.tree.leaves(jax.tree.map(
      lambda x, leaf: x.sharding.is_equivalent_to(leaf.sharding, x.ndim), actual, wanted)))


def assert_restores(run_dir, name):
  restored = restore_step(run_dir, 1, wanted_on(name))
  assert_same(restored.state, content())
  assert_placed(restored.state, wanted_on(name))


@pytest.mark.parametrize("name", ALL_MESHES)
def test_a_checkpoint_is_read_on_every_mesh_and_on_one_device(run_dir, name):
  assert_restores(run_dir, name)


@pytest.mark.slow
@pytest.mark.parametrize("written", ["one", "fsdp8", "expert8"])  # and WRITTEN_ON above
def test_every_mesh_reads_what_others_wrote(tmp_path, written):
  run_dir = saved_on(written, tmp_path)
  for name in ALL_MESHES:
    assert_restores(run_dir, name)


@pytest.mark.parametrize("name", ["fsdp2_expert4", "one"])
def test_a_forward_pass_reads_its_part_alone(run_dir, name):
  model = {item: wanted_on(name)[item] for item in ("params", "router")}
  _, restored, _ = restore_model(run_dir, model)
  assert_same(restored, {item: content()[item] for item in model})
  assert_placed(restored, model)


@pytest.mark.parametrize("name", [
    "fsdp8", "one", pytest.param("data4_expert2", marks=pytest.mark.slow)])
def test_parameters_are_read_in_bfloat16(run_dir, name):
  wanted = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16,
                                                          sharding=leaf.sharding),
                        wanted_on(name)["params"])
  _, params, _ = restore_params(run_dir, wanted)
  assert_same(params, jax.tree.map(lambda x: jnp.asarray(x).astype(jnp.bfloat16),
                                   content()["params"]))
  assert_placed(params, wanted)


def test_a_restore_holds_little_more_than_the_largest_shard_at_a_time():
  """Sides in chunks: 100 of 800 rows lie in at most 3 chunks of 64 rows; columns are whole."""
  mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
  wanted = {"w": jax.ShapeDtypeStruct((800, 10**7), jnp.bfloat16, sharding=NamedSharding(
      mesh, PartitionSpec("x")))}
  stored = types.SimpleNamespace(shape=(800, 10**7), dtype=np.dtype("float32"),
                                 storage=types.SimpleNamespace(chunk_shape=(64, 10**7)))
  assert checkpoint_format.in_flight_gb({"w": stored}, wanted) == 1 + math.ceil(
      3 * 64 * 10**7 * 4 / 10**9)


def test_large_arrays_are_stored_in_chunks(tmp_path, monkeypatch):
  monkeypatch.setattr(checkpoint_format, "_CHUNK_BYTES", 64)
  run_dir = saved_on("one", tmp_path)
  handler = ocp.PyTreeCheckpointHandler()
  for leaf in jax.tree.leaves(handler.metadata(run_dir.checkpoints / "1" / "params").tree):
    assert math.prod(leaf.storage.chunk_shape) * leaf.dtype.itemsize <= 64
  assert_restores(run_dir, "fsdp2_expert4")
