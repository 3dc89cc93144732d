import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.mesh import MESH_AXES
from moe_jax.model.attend import attend, plain_attention
from tests.model.attention_cases import require_equal

CPU = jax.make_mesh((1, 1, 1), MESH_AXES, devices=jax.devices()[:1],
                    axis_types=(jax.sharding.AxisType.Auto,) * 3)


def inputs(seq_len, n_kv, dtype):
  keys = jax.random.split(jax.random.key(seq_len), 4)
  shape = (2, seq_len, 4, 8)
  draw = [jax.random.normal(key, shape, dtype) for key in keys]
  segments_BS = jnp.sort(jax.random.randint(keys[0], (2, seq_len), 0, 3))
  return [draw[0], draw[1][:, :, :n_kv], draw[2][:, :, :n_kv]], segments_BS, draw[3]


# 10 and 3 are no multiples of the four parts; 3 has fewer positions than there are parts.
@pytest.mark.parametrize("seq_len,n_kv,masked", [(16, 4, True), (10, 2, False), (3, 1, True)])
def test_the_cpus_way_is_jaxs_forward_and_gradient(seq_len, n_kv, masked):
  arrays, segments_BS, weight = inputs(seq_len, n_kv, jnp.float32)
  segments_BS = segments_BS if masked else None

  require_equal(functools.partial(attend, mesh=CPU), functools.partial(plain_attention, mesh=CPU),
                arrays, segments_BS, weight, 2e-6)


def test_bfloat16_stays_near_the_exact_result():
  arrays, segments_BS, weight = inputs(16, 2, jnp.bfloat16)

  def loss(*arrays):
    return (attend(*arrays, segments_BS, CPU).astype(jnp.float32) * weight).sum()

  grads = jax.grad(loss, argnums=(0, 1, 2))(*arrays)
  exact = jax.grad(loss, argnums=(0, 1, 2))(*(x.astype(jnp.float32) for x in arrays))
  for grad, true_grad in zip(grads, exact, strict=True):
    assert grad.dtype == jnp.bfloat16
    assert np.linalg.norm(np.float32(grad) - true_grad) < 2**-6 * np.linalg.norm(true_grad)
