"""States small enough to save in a blink, and ways to hurt what was saved."""

import os
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.train.checkpoint import Checkpointer, restore_model


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


def restore_params(run_dir, abstract_params, step=None):
  """(step, the parameters alone, meta) of the newest sound checkpoint, or that of a step."""
  step, model, meta = restore_model(run_dir, {"params": abstract_params}, step)
  return step, model["params"], meta


def files_below(path):
  return sorted(p for p in pathlib.Path(path).rglob("*") if p.is_file())


def listing(run_dir):
  return {str(p): (p.stat().st_mtime_ns, p.stat().st_size if p.is_file() else None)
          for p in [pathlib.Path(run_dir.path), *pathlib.Path(run_dir.path).rglob("*")]}


def flip_a_byte(file):
  content = bytearray(file.read_bytes())
  content[len(content) // 2] ^= 1
  file.write_bytes(content)


def truncate(file):
  os.truncate(file, file.stat().st_size // 2)
