"""A full disk costs the checkpoint that was being written, and no other."""

import contextlib
import shutil
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from moe_jax.errors import FieldError
from moe_jax.run_dir import RunDir
from moe_jax.train import checkpoint_files
from moe_jax.train.checkpoint import Checkpointer, CheckpointError
from tests.train.checkpoint_states import abstract, assert_same, write


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
    assert checkpoint_files.checkpoint_steps(run_dir) == [2, 3]


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a tmpfs")
@pytest.mark.parametrize("kilobytes", [0, 30, 600])
def test_wherever_the_disk_ends_one_error_comes_out_and_closing_adds_none(tmp_path, kilobytes):
  """The save fails at its first file, at a small one, or among the arrays."""
  with small_disk(tmp_path / "disk", megabytes=8) as run_dir:
    with pytest.raises(CheckpointError, match="the disk is full; the last good one is 1$"), \
        Checkpointer(run_dir, keep=2) as checkpointer:
      checkpointer.save(1, noise(1, 2), {}, {})
      checkpointer.wait()
      room = shutil.disk_usage(run_dir.path).free - kilobytes * 1024
      (run_dir.path / "filler").write_bytes(b"x" * room)
      checkpointer.save(2, noise(2, 2), {}, {})
      checkpointer.wait()
    assert checkpoint_files.checkpoint_steps(run_dir) == [1]


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a tmpfs")
def test_disk_too_small_for_the_run_is_refused_before_the_first_save(tmp_path):
  with small_disk(tmp_path / "disk", megabytes=5) as run_dir:
    with Checkpointer(run_dir, keep=2) as checkpointer, \
        pytest.raises(FieldError, match=r"needs 6\.29 MB for 3 checkpoints of 2\.10 MB, and "
                      r"5\.\d\d MB are free"):
      checkpointer.save(1, noise(1, 2), {}, {})
    assert checkpoint_files.checkpoint_steps(run_dir) == []
    write(run_dir, [1], keep=1)


def test_own_checkpoints_count_as_free_space(run_dir, monkeypatch):
  write(run_dir, [1, 2])
  state = noise(0, 1)
  monkeypatch.setattr(checkpoint_files.shutil, "disk_usage",
                      lambda _: type("Usage", (), {"free": 3 * 2**20 - 10_000}))
  with pytest.raises(FieldError, match="3.15 MB"):
    checkpoint_files.check_free_space({RunDir(run_dir.path.parent / "other"): 2}, state)
  checkpoint_files.check_free_space({run_dir: 2}, state)


def test_runs_that_train_side_by_side_need_room_for_all_of_them(tmp_path, monkeypatch):
  runs = [RunDir(tmp_path / name) for name in ("a", "b")]
  for free, fits in ((4 * 2**20, True), (4 * 2**20 - 1, False)):
    monkeypatch.setattr(checkpoint_files.shutil, "disk_usage",
                        lambda _, free=free: type("Usage", (), {"free": free}))
    for run_dir in runs:
      checkpoint_files.check_free_space({run_dir: 1}, noise(0, 1))
    if fits:
      checkpoint_files.check_free_space(dict.fromkeys(runs, 1), noise(0, 1))
      continue
    with pytest.raises(FieldError, match="and 1 more together needs 4.19 MB for 4 checkpoints "
                       "of 1.05 MB, and 4.19 MB are free"):
      checkpoint_files.check_free_space(dict.fromkeys(runs, 1), noise(0, 1))
