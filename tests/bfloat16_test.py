import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.bfloat16 import from_bits, part_of, saves_bits, to_bits

EVERY = jnp.arange(2**16, dtype=jnp.uint16)  # every bfloat16 there is, NaNs with their payloads too


def test_bits_are_the_same_number():
  x = jax.lax.bitcast_convert_type(EVERY, jnp.bfloat16)
  np.testing.assert_array_equal(to_bits(x).bits, EVERY)
  np.testing.assert_array_equal(jax.lax.bitcast_convert_type(from_bits(to_bits(x)), jnp.uint16),
                                EVERY)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int32", "uint16", "bool"])
def test_other_types_stay_as_they_are(dtype):
  x = jnp.ones(3, dtype)
  assert to_bits(x) is x and from_bits(x) is x


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_part_is_that_of_the_array(dtype):
  x = jax.random.normal(jax.random.key(0), (5, 3), dtype)
  part = part_of(to_bits(x), lambda x: jax.lax.dynamic_slice_in_dim(x, 2, 2))
  assert part.dtype == x.dtype
  np.testing.assert_array_equal(part, x[2:4])


def layer(x_TD, params):
  """As a model's: bfloat16 and float32 values are saved, and an index that is uint16 by itself."""
  w_DD, key = params
  hidden_TD = jnp.tanh(x_TD @ w_DD.astype(x_TD.dtype)) * jax.random.bernoulli(key, shape=x_TD.shape)
  order_T = jnp.argsort(hidden_TD[:, 0]).astype(jnp.uint16)
  scale_T1 = jnp.exp(hidden_TD.astype(jnp.float32)).sum(-1, keepdims=True)
  return (x_TD + hidden_TD[order_T] / scale_T1.astype(x_TD.dtype)), hidden_TD.sum()


def loss(body, x_TD, w_LDD):
  keys_L = jax.random.split(jax.random.key(1), len(w_LDD))
  x_TD, sums_L = jax.lax.scan(body, x_TD, (w_LDD, keys_L))
  return x_TD.astype(jnp.float32).sum() + sums_L.astype(jnp.float32).sum()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("remat", [False, True])
def test_gradients_of_a_scan_are_the_same_bit_for_bit(dtype, remat):
  x_TD = jax.random.normal(jax.random.key(2), (6, 4), dtype)
  w_LDD = jax.random.normal(jax.random.key(3), (3, 4, 4))
  body = jax.checkpoint(layer, prevent_cse=False) if remat else layer
  run = jax.jit(jax.value_and_grad(loss, argnums=(1, 2)), static_argnums=0)
  jax.tree.map(np.testing.assert_array_equal, run(saves_bits(body), x_TD, w_LDD),
               run(body, x_TD, w_LDD))


def saved(body):
  """Types of what the forward pass of a scan of `body` saves."""
  x_TD, w_LDD = jnp.ones((6, 4), jnp.bfloat16), jnp.ones((3, 4, 4))
  _, vjp = jax.vjp(lambda x_TD: loss(body, x_TD, w_LDD), x_TD)
  return {str(leaf.dtype) for leaf in jax.tree.leaves(vjp) if getattr(leaf, "ndim", 0) == 3}


def test_what_is_saved_is_bits():
  assert "bfloat16" in saved(layer)
  assert "bfloat16" not in saved(saves_bits(layer)) and "uint16" in saved(saves_bits(layer))
