"""SIGKILL at any moment of a save, and two processes that save together."""

import os
import random
import signal
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.train import checkpoint_files
from tests.experiment_files import ROOT
from tests.train.checkpoint_states import assert_same, restore, restore_params, state_at, write

CHILD = """
import sys
from etils import epath
from moe_jax.run_dir import RunDir
from moe_jax.train.checkpoint import Checkpointer
sys.path.insert(0, {root!r})
from tests.train.checkpoint_states import abstract, state_at

with Checkpointer(RunDir(epath.Path({path!r})), keep={keep}) as checkpointer:
  restored = checkpointer.restore_latest(abstract(state_at(0)))
  first = restored.step + 1 if restored else 1
  {before_saving}
  for step in range(first, first + 10_000):
    checkpointer.save(step, state_at(step), {{"next": step}}, {{}})
    print(step, flush=True)
"""


def start_child(run_dir, keep=2, before_saving="pass"):
  code = CHILD.format(root=str(ROOT), path=str(run_dir.path),
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
  assert checkpoint_files.checkpoint_steps(run_dir) == [2, 3]
  _, params, _ = restore_params(
      run_dir, {"x_TD": jax.ShapeDtypeStruct((4, 8), jnp.float32)})
  np.testing.assert_array_equal(params["x_TD"], 3 * np.arange(32).reshape(4, 8))
