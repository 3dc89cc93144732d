"""The kernel's own program, interpreted, against JAX's attention. On a TPU it has never run here;
that a step with it compiles for one is tests/plan/plan_test.py's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.mesh import MESH_AXES
from moe_jax.model import splash
from moe_jax.model.attend import plain_attention
from tests.model.attention_cases import require_equal


@pytest.mark.parametrize("masked, shape, h", [(True, (1, 1, 1), splash.LANES),
                                              (False, (2, 1, 1), 42)])
def test_it_is_attention_forward_and_gradient(masked, shape, h):
  """Grouped queries; two tiles, of which one lies above the diagonal; heads of any width."""
  n_devices = int(np.prod(shape))
  mesh = jax.make_mesh(shape, MESH_AXES, devices=jax.devices()[:n_devices],
                       axis_types=(jax.sharding.AxisType.Auto,) * 3)
  keys = jax.random.split(jax.random.key(0), 5)
  seq_len = 2 * splash.LANES
  query_BSHh, key_BSKh, value_BSKh = (
      jax.random.normal(key, (2, seq_len, heads, h))
      for key, heads in zip(keys, (4, 2, 2), strict=False))
  weight = jax.random.normal(keys[3], query_BSHh.shape)
  segments_BS = jnp.sort(jax.random.randint(keys[4], (2, seq_len), 0, 3)) if masked else None

  require_equal(lambda *arrays: splash.splash_attention(*arrays, mesh, interpret=True),
                lambda *arrays: plain_attention(*arrays, mesh),
                (query_BSHh, key_BSKh, value_BSKh), segments_BS, weight, 1e-5)


@pytest.mark.parametrize("seq_len, h, dtype, whole", [
    (256, 128, "bfloat16", True), (200, 128, "bfloat16", False), (256, 42, "bfloat16", True),
    (256, 128, "float32", False)])
def test_what_it_takes(seq_len, h, dtype, whole):
  assert splash.suits(jax.ShapeDtypeStruct((2, seq_len, 4, h), dtype)) == whole
