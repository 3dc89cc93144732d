"""The kernel's own program, interpreted, against JAX's attention, and what is lowered for a GPU.
It has never run on one here."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.mesh import MESH_AXES
from moe_jax.model import attend, flash
from tests.gpu import pretend_h100
from tests.model.attention_cases import require_equal


def mesh_of(shape):
  return jax.make_mesh(shape, MESH_AXES, devices=jax.devices()[:int(np.prod(shape))],
                       axis_types=(jax.sharding.AxisType.Auto,) * 3)


def inputs(h, dtype=jnp.float32, seq_len=256):
  """Grouped queries, two tiles, of which one lies above the diagonal; three documents."""
  keys = jax.random.split(jax.random.key(0), 5)
  arrays = [jax.random.normal(key, (2, seq_len, heads, h), dtype)
            for key, heads in zip(keys, (4, 2, 2, 4), strict=False)]
  return arrays, jnp.sort(jax.random.randint(keys[4], (2, seq_len), 0, 3))


@pytest.mark.parametrize("masked, shape, h", [(True, (1, 1, 1), 64), (False, (2, 1, 1), 42)])
def test_it_is_attention_forward_and_gradient(masked, shape, h):
  mesh = mesh_of(shape)
  (*arrays, weight), segments_BS = inputs(h)
  segments_BS = segments_BS if masked else None

  require_equal(lambda *arrays: flash.flash_attention(*arrays, mesh, interpret=True),
                lambda *arrays: attend.plain_attention(*arrays, mesh),
                arrays, segments_BS, weight, 1e-5)


@pytest.mark.parametrize("population", [False, True])
def test_a_gpu_gets_it_forward_and_backward(population, monkeypatch):
  """Also under `vmap`, which cuDNN's attention of JAX 0.10.2 does not stand with documents."""
  pretend_h100(monkeypatch)
  (*arrays, _), segments_BS = inputs(24, jnp.bfloat16)

  def grads(*inputs):
    return jax.grad(lambda *arrays: flash.flash_attention(
        *arrays, inputs[3], mesh_of((1, 1, 1))).astype(jnp.float32).sum(), (0, 1, 2))(*inputs[:3])

  everything = *arrays, segments_BS
  if population:
    grads, everything = jax.vmap(grads), [jnp.stack([x, x]) for x in everything]
  lowered = jax.jit(grads).trace(*everything).lower(lowering_platforms=("cuda",)).as_text()
  assert lowered.count("__gpu$xla.gpu.triton") == 3  # forward; what is common to a row; backward
  assert "256x256x" not in lowered and "x256x256" not in lowered  # no scores of a sequence


def test_a_jax_without_triton_has_plain_attention(monkeypatch):
  monkeypatch.setitem(sys.modules, "jax.experimental.pallas.ops.gpu", None)
  flash.kernel.cache_clear()
  try:
    assert not flash.suits(jax.ShapeDtypeStruct((2, 256, 4, 64), "bfloat16"))
  finally:
    flash.kernel.cache_clear()


@pytest.mark.parametrize("platform, shape, dtype, used", [
    ("gpu", (2, 256, 4, 64), "bfloat16", True), ("gpu", (2, 256, 4, 42), "bfloat16", True),
    ("gpu", (2, 200, 4, 64), "bfloat16", False), ("gpu", (2, 256, 4, 160), "bfloat16", False),
    ("gpu", (2, 256, 4, 8), "bfloat16", False),
    ("gpu", (2, 256, 4, 64), "float32", False), ("cpu", (2, 256, 4, 64), "bfloat16", False)])
def test_what_it_is_used_for(monkeypatch, platform, shape, dtype, used):
  """A mesh of devices that are not there decides as theirs would."""
  class Mesh:
    devices = np.array([type("Device", (), {"platform": platform})()])

  for module, name in ((flash, "flash_attention"), (attend, "plain_attention"),
                       (attend, "_by_query_blocks")):
    monkeypatch.setattr(module, name, lambda *_, name=name: name)
  x = jax.ShapeDtypeStruct(shape, dtype)
  assert (attend.attend(x, x, x, None, Mesh()) == "flash_attention") == used
