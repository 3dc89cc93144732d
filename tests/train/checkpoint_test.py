"""What is saved comes back, under stable names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from moe_jax.run_dir import RunDir
from moe_jax.train import checkpoint, checkpoint_files, checkpoint_format
from moe_jax.train.checkpoint import Checkpointer, CheckpointError
from tests.train.checkpoint_states import (
  abstract,
  assert_same,
  files_below,
  listing,
  restore,
  restore_params,
  state_at,
  write,
)


def test_round_trip_is_bitwise(run_dir):
  write(run_dir, [3])
  restored = restore(run_dir)
  assert restored.step == 3
  assert_same(restored.state, state_at(3))
  assert restored.data == {"next": 3}
  assert restored.meta == {"format_version": checkpoint_format.FORMAT_VERSION, "dataset": "abc"}


def test_no_checkpoint_is_none(run_dir):
  assert restore(run_dir) is None


def test_relative_path(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  run_dir = RunDir(epath.Path("out") / "cell")
  write(run_dir, [1])
  assert restore(run_dir).step == 1


def test_arrays_are_stored_under_the_names_of_their_paths(run_dir):
  write(run_dir, [1])
  stored = checkpoint.ocp.PyTreeCheckpointHandler().metadata(
      run_dir.checkpoints / "1" / "optimizer").tree
  assert set(stored) == {"opt_state", "step"}
  assert set(stored["opt_state"]["0"]) == {"count", "mu"}


def test_save_does_not_see_a_later_donation(run_dir):
  """The step that follows a save overwrites the very buffers that are being written."""
  update = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  x_TD = np.random.default_rng(0).standard_normal((1024, 512)).astype(np.float32)
  for step, spec in enumerate((PartitionSpec(), PartitionSpec("data")), start=1):
    # Made by a program: an array that shares NumPy's memory cannot be donated.
    make = jax.jit(lambda x: x + 0, out_shardings=NamedSharding(mesh, spec))
    unsaved, saved = make(x_TD), make(x_TD)
    jax.block_until_ready(update(unsaved))
    assert unsaved.is_deleted()  # so the update does overwrite what nobody holds
    with Checkpointer(run_dir, 2) as checkpointer:
      checkpointer.save(step, {"params": {"x_TD": saved}}, {}, {})
      jax.block_until_ready(update(saved))
    _, params, _ = restore_params(
        run_dir, {"x_TD": jax.ShapeDtypeStruct(x_TD.shape, x_TD.dtype)})
    np.testing.assert_array_equal(params["x_TD"], x_TD)


def test_keeps_the_latest_and_their_checksums(run_dir):
  write(run_dir, [1, 2, 3, 4, 5])
  assert checkpoint_files.checkpoint_steps(run_dir) == [4, 5]
  assert {f.name for f in (run_dir.path / "checksums").iterdir()} == {"4.json", "5.json"}


def test_named_steps_are_kept_beside_the_latest(run_dir):
  for first in (1, 4):  # also by a later attempt
    with Checkpointer(run_dir, 1, keep_steps=(2, 5, 99)) as checkpointer:
      for step in range(first, first + 3):
        checkpointer.save(step, state_at(step), {}, {})
  assert checkpoint_files.checkpoint_steps(run_dir) == [2, 5, 6]
  restored = checkpoint.restore_step(run_dir, 2, abstract(state_at(0)))
  assert_same(restored.state, state_at(2))


def test_parameters_are_rounded_to_the_type_asked_for_and_state_is_not(run_dir):
  write(run_dir, [1])
  wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16),
                        state_at(0)["params"])
  _, params, _ = restore_params(run_dir, wanted)
  assert_same(params, jax.tree.map(lambda x: x.astype(jnp.bfloat16), state_at(1)["params"]))
  with pytest.raises(CheckpointError, match="w_LDF is float32.* there and int32"):
    restore_params(run_dir, jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.int32), wanted))
  with pytest.raises(CheckpointError, match="w_LDF is float32.* there and bfloat16"):
    checkpoint.restore_step(run_dir, 1, {**abstract(state_at(0)), "params": wanted})


def test_saving_the_latest_step_again_does_nothing(run_dir):
  write(run_dir, [1, 1])
  assert checkpoint_files.checkpoint_steps(run_dir) == [1]


def test_saving_below_the_latest_step_is_refused(run_dir):
  write(run_dir, [5])
  with pytest.raises(CheckpointError, match="checkpoint 3 is not above the latest"):
    write(run_dir, [3])


def test_other_arrays_are_named_in_one_line(run_dir):
  write(run_dir, [1])
  wider = abstract(state_at(0, width=32))
  other_type = abstract(state_at(0))
  other_type["params"]["scale_D"] = jax.ShapeDtypeStruct((8,), jnp.float32)
  more = abstract(state_at(0))
  more["params"]["bias_D"] = jax.ShapeDtypeStruct((8,), jnp.float32)
  for wanted, message in [
      (wider, r"params/layers/w_LDF is float32\[2, 8, 16\] there and float32\[2, 8, 32\] here"),
      (other_type, r"params/scale_D is bfloat16\[8\] there and float32\[8\] here"),
      (more, r"params/bias_D is absent there and float32\[8\] here")]:
    with Checkpointer(run_dir, 1) as checkpointer, \
        pytest.raises(CheckpointError, match=message) as caught:
      checkpointer.restore_latest(wanted)
    assert "\n" not in str(caught.value)


def test_another_format_version_is_refused(run_dir, monkeypatch):
  with monkeypatch.context() as patch:
    patch.setattr(checkpoint_format, "FORMAT_VERSION", 99)
    write(run_dir, [1])
  with pytest.raises(CheckpointError, match="has format version 99, this code reads 1"):
    restore(run_dir)


def test_params_alone_are_read_and_nothing_is_changed(run_dir):
  write(run_dir, [1, 2])
  for file in files_below(run_dir.checkpoints / "2" / "optimizer"):
    file.write_bytes(b"")
  (run_dir.checkpoints / "3.orbax-checkpoint-tmp").mkdir()
  before = listing(run_dir)
  wanted = abstract(state_at(0)["params"])
  step, params, meta = restore_params(run_dir, wanted)
  assert step == 2 and meta["dataset"] == "abc"
  assert_same(params, state_at(2)["params"])
  step, params, _ = restore_params(run_dir, wanted, step=1)
  assert step == 1
  assert_same(params, state_at(1)["params"])
  assert listing(run_dir) == before
