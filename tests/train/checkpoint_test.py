"""Checkpoints survive a full disk, damage to any file, and SIGKILL at any moment."""

import contextlib
import json
import logging
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from moe_jax.errors import FieldError
from moe_jax.run_dir import RunDir
from moe_jax.train import checkpoint, checkpoint_format, checksums
from moe_jax.train.checkpoint import Checkpointer, CheckpointError


class Moments(NamedTuple):
  count: jax.Array
  mu: dict


def state_at(step: int, width: int = 16):
  """A small state that is a function of the step: floats, bfloat16 and integers."""
  rng = np.random.default_rng(step)
  w_LDF = rng.standard_normal((2, 8, width)).astype(np.float32)
  scale_D = rng.standard_normal(8)
  return {
      "params": {"layers": {"w_LDF": jnp.asarray(w_LDF)},
                 "scale_D": jnp.asarray(scale_D, jnp.bfloat16)},
      "opt_state": (Moments(jnp.int32(step), {"w_LDF": jnp.asarray(w_LDF ** 2)}), ()),
      "step": jnp.int32(step),
  }


def abstract(state, sharding=None):
  return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state)


def assert_same(actual, expected):
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    assert a.dtype == b.dtype and a.shape == b.shape
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def write(run_dir, steps, keep=2):
  with Checkpointer(run_dir, keep) as checkpointer:
    for step in steps:
      checkpointer.save(step, state_at(step), {"next": step}, {"dataset": "abc"})


def restore(run_dir, keep=2):
  with Checkpointer(run_dir, keep) as checkpointer:
    return checkpointer.restore_latest(abstract(state_at(0)))


def files_below(path):
  return sorted(p for p in pathlib.Path(path).rglob("*") if p.is_file())


def flip_a_byte(file):
  content = bytearray(file.read_bytes())
  content[len(content) // 2] ^= 1
  file.write_bytes(content)


def truncate(file):
  os.truncate(file, file.stat().st_size // 2)


@pytest.fixture
def run_dir(tmp_path):
  return RunDir(epath.Path(tmp_path / "run"))


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
    _, params, _ = checkpoint.restore_params(
        run_dir, {"x_TD": jax.ShapeDtypeStruct(x_TD.shape, x_TD.dtype)})
    np.testing.assert_array_equal(params["x_TD"], x_TD)


def test_restores_on_other_meshes(run_dir):
  def sharded(sizes, n_devices):
    mesh = jax.make_mesh(sizes, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2,
                         devices=jax.devices()[:n_devices])
    spec_of = {3: PartitionSpec(None, "fsdp", "data"), 1: PartitionSpec("fsdp"),
               0: PartitionSpec()}
    return lambda x: NamedSharding(mesh, spec_of[len(x.shape)])

  sharding_of = sharded((2, 4), 8)
  state = jax.tree.map(lambda x: jax.device_put(x, sharding_of(x)), state_at(1))
  with Checkpointer(run_dir, 1) as checkpointer:
    checkpointer.save(1, state, {}, {})
  for sizes, n_devices in [((4, 2), 8), ((1, 4), 4), ((2, 1), 2), ((1, 1), 1)]:
    sharding_of = sharded(sizes, n_devices)
    wanted = jax.tree.map(lambda x, place=sharding_of: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=place(x)), state)
    with Checkpointer(run_dir, 1) as checkpointer:
      restored = checkpointer.restore_latest(wanted).state
    assert_same(restored, state_at(1))
    assert all(jax.tree.leaves(jax.tree.map(
        lambda x, w: x.sharding == w.sharding, restored, wanted)))


def test_keeps_the_latest_and_their_checksums(run_dir):
  write(run_dir, [1, 2, 3, 4, 5])
  assert checkpoint.checkpoint_steps(run_dir) == [4, 5]
  assert {f.name for f in (run_dir.path / "checksums").iterdir()} == {"4.json", "5.json"}


def test_saving_the_latest_step_again_does_nothing(run_dir):
  write(run_dir, [1, 1])
  assert checkpoint.checkpoint_steps(run_dir) == [1]


def test_saving_below_the_latest_step_is_refused(run_dir):
  write(run_dir, [5])
  with pytest.raises(CheckpointError, match="checkpoint 3 is not above the latest"):
    write(run_dir, [3])


def test_damage_to_any_file_is_noticed_and_the_previous_checkpoint_used(run_dir, caplog):
  """Each file is hurt in every way; a step that was thrown away can be saved again."""
  write(run_dir, [1, 2])
  marks = {"_CHECKPOINT_METADATA", "commit_success.txt"}  # carry no value that is read
  files = [f for f in files_below(run_dir.checkpoints / "2")
           if f.parent.name != "2" or f.name not in marks]
  assert len(files) > 20
  pristine = {f: f.read_bytes() for f in files_below(run_dir.path)}
  hurts = (flip_a_byte, truncate, os.remove)
  for number, file in enumerate([*files, pathlib.Path(run_dir.checksums(2))]):
    for hurt in hurts:
      hurt(file)
      assert checksums.damage(run_dir.checkpoints / "2", run_dir.checksums(2)), (file, hurt)
      file.write_bytes(pristine[file])
    hurts[number % 3](file)
    caplog.clear()
    restored = restore(run_dir)
    assert restored.step == 1
    assert_same(restored.state, state_at(1))
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert "checkpoints/2 is damaged" in warning and "\n" not in warning
    if file in files:
      assert str(file.relative_to(pathlib.Path(run_dir.checkpoints / "2"))) in warning
    assert checkpoint.checkpoint_steps(run_dir) == [1]
    for path, content in pristine.items():
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(content)
  os.remove(files[0])
  with Checkpointer(run_dir, 2) as checkpointer:
    assert checkpointer.restore_latest(abstract(state_at(0))).step == 1
    checkpointer.save(2, state_at(2), {}, {})
  assert restore(run_dir).step == 2


def test_damage_to_the_marks_of_the_commit_does_no_harm(run_dir):
  for hurt in (flip_a_byte, truncate, os.remove):
    for name in ("_CHECKPOINT_METADATA", "commit_success.txt"):
      step = (checkpoint.checkpoint_steps(run_dir) or [0])[-1] + 1
      write(run_dir, [step])
      hurt(pathlib.Path(run_dir.checkpoints / str(step) / name))
      assert_same(restore(run_dir).state, state_at(step))


def test_a_file_that_the_checksums_do_not_know_is_damage(run_dir):
  write(run_dir, [1, 2])
  (run_dir.checkpoints / "2" / "params" / "stray").write_text("x")
  assert restore(run_dir).step == 1


def test_no_sound_checkpoint_ends_in_one_line_and_deletes_nothing(run_dir):
  write(run_dir, [1, 2])
  for step in (1, 2):
    flip_a_byte(max(files_below(run_dir.checkpoints / str(step) / "params"),
                    key=lambda f: f.stat().st_size))
  before = listing(run_dir)
  with pytest.raises(CheckpointError, match=r"(?s)^no checkpoint in .* is sound .*2: params/"
                     r".*1: params/.*train from step 0$") as caught:
    restore(run_dir)
  assert "\n" not in str(caught.value)
  assert listing(run_dir) == before


def test_lost_checksums_do_not_silently_start_over(run_dir):
  write(run_dir, [1])
  (run_dir.path / "checksums").rmtree()
  with pytest.raises(CheckpointError, match="1: it has no checksums"):
    restore(run_dir)


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


# Evaluation reads parameters only


def listing(run_dir):
  return {str(p): (p.stat().st_mtime_ns, p.stat().st_size if p.is_file() else None)
          for p in [pathlib.Path(run_dir.path), *pathlib.Path(run_dir.path).rglob("*")]}


def test_params_alone_are_read_and_nothing_is_changed(run_dir):
  write(run_dir, [1, 2])
  for file in files_below(run_dir.checkpoints / "2" / "optimizer"):
    file.write_bytes(b"")
  (run_dir.checkpoints / "3.orbax-checkpoint-tmp").mkdir()
  before = listing(run_dir)
  wanted = abstract(state_at(0)["params"])
  step, params, meta = checkpoint.restore_params(run_dir, wanted)
  assert step == 2 and meta["dataset"] == "abc"
  assert_same(params, state_at(2)["params"])
  step, params, _ = checkpoint.restore_params(run_dir, wanted, step=1)
  assert step == 1
  assert_same(params, state_at(1)["params"])
  assert listing(run_dir) == before


def test_params_of_damaged_or_absent_checkpoints(run_dir, caplog):
  wanted = abstract(state_at(0)["params"])
  with pytest.raises(CheckpointError, match="holds no finished checkpoint"):
    checkpoint.restore_params(run_dir, wanted)
  write(run_dir, [1, 2])
  flip_a_byte(files_below(run_dir.checkpoints / "2" / "params")[0])
  before = listing(run_dir)
  assert checkpoint.restore_params(run_dir, wanted)[0] == 1
  assert "checkpoints/2 is damaged and is passed over" in caplog.text
  with pytest.raises(CheckpointError, match="checkpoints/2 is damaged: params/"):
    checkpoint.restore_params(run_dir, wanted, step=2)
  with pytest.raises(CheckpointError, match="holds no checkpoint 7: it has 1, 2"):
    checkpoint.restore_params(run_dir, wanted, step=7)
  assert listing(run_dir) == before


# The disk is full


@contextlib.contextmanager
def small_disk(path, megabytes):
  path.mkdir()
  mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", path],
                           capture_output=True, text=True, check=False)
  if mounted.returncode:
    pytest.skip(f"a small tmpfs cannot be mounted here: {mounted.stderr.strip()}")
  try:
    yield RunDir(epath.Path(path / "run"))
  finally:
    subprocess.run(["umount", path], check=True)


def noise(step, megabytes):
  rng = np.random.default_rng(step)
  bits = rng.integers(0, 2**32, size=megabytes * 2**18, dtype=np.uint32)  # incompressible
  return {"params": {"bits": jnp.asarray(bits)}}


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a tmpfs")
def test_full_disk_keeps_what_is_there_and_says_so_in_one_line(tmp_path, caplog):
  with small_disk(tmp_path / "disk", megabytes=8) as run_dir:
    checkpointer = Checkpointer(run_dir, keep=2)
    for step in (1, 2):
      checkpointer.save(step, noise(step, 2), {}, {})
    checkpointer.wait()
    (run_dir.path / "filler").write_bytes(b"x" * 3 * 2**20)
    checkpointer.save(3, noise(3, 2), {}, {})  # begins; the error comes out later
    with pytest.raises(CheckpointError, match=r"checkpoint 3 could not be written to .*: "
                       r"the disk is full; the last good one is 2$") as caught:
      checkpointer.save(4, noise(4, 2), {}, {})
    checkpointer.close()
    assert "\n" not in str(caught.value) and not caplog.records
    assert not list(run_dir.checkpoints.glob("*tmp*"))  # there is room for a status again
    (run_dir.path / "filler").unlink()
    with Checkpointer(run_dir, keep=2) as checkpointer:
      restored = checkpointer.restore_latest(abstract(noise(0, 2)))
      assert restored.step == 2
      assert_same(restored.state, noise(2, 2))
      checkpointer.save(3, noise(3, 2), {}, {})
    assert checkpoint.checkpoint_steps(run_dir) == [2, 3]


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a tmpfs")
def test_disk_too_small_for_the_run_is_refused_before_the_first_save(tmp_path):
  with small_disk(tmp_path / "disk", megabytes=5) as run_dir:
    with Checkpointer(run_dir, keep=2) as checkpointer, \
        pytest.raises(FieldError, match=r"needs 6\.29 MB for 3 checkpoints of 2\.10 MB, and "
                      r"5\.\d\d MB are free"):
      checkpointer.save(1, noise(1, 2), {}, {})
    assert checkpoint.checkpoint_steps(run_dir) == []
    write(run_dir, [1], keep=1)


def test_own_checkpoints_count_as_free_space(run_dir, monkeypatch):
  write(run_dir, [1, 2])
  state = noise(0, 1)
  monkeypatch.setattr(checkpoint.shutil, "disk_usage",
                      lambda _: type("Usage", (), {"free": 3 * 2**20 - 10_000}))
  with pytest.raises(FieldError, match="3.15 MB"):
    checkpoint.check_free_space(RunDir(run_dir.path.parent / "other"), state, keep=2)
  checkpoint.check_free_space(run_dir, state, keep=2)


# SIGKILL

CHILD = """
import sys
from etils import epath
from moe_jax.run_dir import RunDir
from moe_jax.train.checkpoint import Checkpointer
sys.path.insert(0, {tests!r})
from checkpoint_test import abstract, state_at

with Checkpointer(RunDir(epath.Path({path!r})), keep={keep}) as checkpointer:
  restored = checkpointer.restore_latest(abstract(state_at(0)))
  first = restored.step + 1 if restored else 1
  {before_saving}
  for step in range(first, first + 10_000):
    checkpointer.save(step, state_at(step), {{"next": step}}, {{}})
    print(step, flush=True)
"""


def start_child(run_dir, keep=2, before_saving="pass"):
  code = CHILD.format(tests=str(pathlib.Path(__file__).parent), path=str(run_dir.path),
                      keep=keep, before_saving=before_saving)
  return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True,
                          env={**os.environ, "XLA_FLAGS": ""})


def test_sigkill_while_saving_loses_no_finished_checkpoint(run_dir):
  """Killed at random moments of a loop that does nothing but save; each start goes on."""
  moments = random.Random(0)
  reached = 0
  for _ in range(4):
    child = start_child(run_dir)
    first = int(child.stdout.readline())
    assert first > reached
    time.sleep(moments.uniform(0.05, 0.4))
    child.send_signal(signal.SIGKILL)
    begun = [first, *map(int, child.communicate()[0].split())]
    restored = restore(run_dir)
    if restored is None:  # killed before the very first was finished
      assert begun[-1] == 1
      continue
    # A save waits for the one before it, so all that were begun but the last are finished.
    assert restored.step >= begun[-1] - 1
    assert_same(restored.state, state_at(restored.step))
    assert restored.data == {"next": restored.step}
    reached = restored.step
  assert reached > 0


@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize("moment", ["before", "after"])
def test_sigkill_around_the_checksums_falls_back_without_loss(run_dir, keep, moment):
  """All files of step 3 are written, its checksums are not, or only just."""
  write(run_dir, [1, 2], keep)
  kill = "os.kill(os.getpid(), signal.SIGKILL)"
  record = "record(*args)"
  body = f"({kill}, {record})" if moment == "before" else f"({record}, {kill})"
  child = start_child(run_dir, keep, before_saving=(
      "import os, signal; from moe_jax.train import checksums; record = checksums.record; "
      f"checksums.record = lambda *args: {body}"))
  child.communicate()
  assert child.returncode == -signal.SIGKILL
  assert (run_dir.checkpoints / "3.orbax-checkpoint-tmp").exists()
  assert run_dir.checksums(3).exists() == (moment == "after")
  restored = restore(run_dir, keep)
  assert restored.step == 2
  assert_same(restored.state, state_at(2))
  write(run_dir, [3], keep)
  assert restore(run_dir, keep).step == 3


def test_sigkill_in_the_first_save_starts_over(run_dir):
  child = start_child(run_dir, before_saving=(
      "import os, signal; from moe_jax.train import checksums; "
      "checksums.record = lambda *args: os.kill(os.getpid(), signal.SIGKILL)"))
  child.communicate()
  assert (run_dir.checkpoints / "1.orbax-checkpoint-tmp").exists()
  assert restore(run_dir) is None
  assert not list(run_dir.checkpoints.iterdir())


def test_checksums_are_plain_json(run_dir):
  write(run_dir, [1])
  listed = json.loads(run_dir.checksums(1).read_text())
  assert set(listed["meta/metadata"]) == {"bytes", "sha256"}


# Several processes

PEER = """
import sys
import jax, numpy as np
jax.distributed.initialize("localhost:" + sys.argv[1], 2, int(sys.argv[2]))
from etils import epath
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from moe_jax.run_dir import RunDir
from moe_jax.train.checkpoint import Checkpointer

mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
sharding = NamedSharding(mesh, PartitionSpec("data"))
x_TD = np.arange(32, dtype=np.float32).reshape(4, 8)
def state_at(step):
  return {"params": {"x_TD": jax.make_array_from_callback(
      x_TD.shape, sharding, lambda index: x_TD[index] * step)}}

run_dir = RunDir(epath.Path(sys.argv[3]))
wanted = {"params": {"x_TD": jax.ShapeDtypeStruct(x_TD.shape, x_TD.dtype, sharding=sharding)}}
with Checkpointer(run_dir, keep=2) as checkpointer:
  assert checkpointer.restore_latest(wanted) is None
  for step in (1, 2, 3):
    checkpointer.save(step, state_at(step), {"next": step}, {})
if jax.process_index() == 0:
  (file,) = (run_dir.checkpoints / "3" / "data").glob("metadata")
  file.write_text("{}")
with Checkpointer(run_dir, keep=2) as checkpointer:
  restored = checkpointer.restore_latest(wanted)
  assert restored.step == 2 and restored.data == {"next": 2}
  for shard in restored.state["params"]["x_TD"].addressable_shards:
    np.testing.assert_array_equal(shard.data, x_TD[shard.index] * 2)
  checkpointer.save(3, state_at(3), {}, {})
"""


def test_two_processes_write_one_checkpoint_and_agree_on_the_one_to_use(run_dir):
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    port = probe.getsockname()[1]
  one_device_each = {**os.environ, "XLA_FLAGS": ""}
  peers = [subprocess.Popen([sys.executable, "-c", PEER, str(port), str(index), run_dir.path],
                            stderr=subprocess.PIPE, text=True, env=one_device_each)
           for index in (0, 1)]
  errors = [peer.communicate(timeout=120)[1] for peer in peers]
  assert [peer.returncode for peer in peers] == [0, 0], "\n".join(errors)
  assert ["checkpoints/3 is damaged" in error for error in errors] == [True, False]
  assert checkpoint.checkpoint_steps(run_dir) == [2, 3]
  _, params, _ = checkpoint.restore_params(
      run_dir, {"x_TD": jax.ShapeDtypeStruct((4, 8), jnp.float32)})
  np.testing.assert_array_equal(params["x_TD"], 3 * np.arange(32).reshape(4, 8))
