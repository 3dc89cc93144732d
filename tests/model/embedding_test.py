"""The gradient of a look-up against a sum in float64, on one device and on eight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.mesh import make_mesh
from moe_jax.model.embedding import look_up
from tests.small import MESHES, ONE_DEVICE, small_config

B, S, V, D = 8, 512, 5, 3


@pytest.mark.parametrize("mesh_name", ["one", "data2_fsdp2_expert2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_and_their_gradient(mesh_name, dtype):
  """Token 0 stands in four of five places: as sums of bfloat16 its gradient would be a third."""
  config = small_config(execution={"mesh": MESHES.get(mesh_name, ONE_DEVICE)})
  mesh = make_mesh(config, jax.devices()[:8 if mesh_name in MESHES else 1])
  keys = jax.random.split(jax.random.key(0), 3)
  token_BS = jnp.maximum(jax.random.randint(keys[0], (B, S), 1 - 4 * (V - 1), V), 0)
  table_VD = jax.random.normal(keys[1], (V, D), dtype)
  weight_BSD = 1 + 0.1 * jax.random.normal(keys[2], (B, S, D), dtype)

  def loss(table_VD):
    x_BSD = look_up(table_VD, token_BS, mesh)
    return (x_BSD * weight_BSD).astype(jnp.float32).sum(), x_BSD

  grad_VD, x_BSD = jax.jit(jax.grad(loss, has_aux=True))(table_VD)
  np.testing.assert_array_equal(x_BSD, table_VD[token_BS])
  true_VD = np.zeros((V, D))
  np.add.at(true_VD, np.asarray(token_BS).ravel(), np.float64(weight_BSD).reshape(-1, D))
  assert grad_VD.dtype == dtype and np.bincount(np.asarray(token_BS).ravel())[0] > 3000
  np.testing.assert_allclose(grad_VD.astype(jnp.float32), true_VD,
                             rtol=1e-6 if dtype == "float32" else 2**-7)
