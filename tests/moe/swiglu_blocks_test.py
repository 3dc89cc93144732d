import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.moe.grouped_matmul import SPARE_ROWS, grouped_matmul
from moe_jax.moe.swiglu_blocks import swiglu_blocks

SIZES = [0, 300, 1, 256, 0, 43]  # nothing, more than a block, one row, one block exactly
N_ROWS, D, F = sum(SIZES), 6, 4


def separate_products(x_SD, weight_S, w_gate_up_EDH, w_down_EFD, size_E):
  gate_SF, up_SF = jnp.split(grouped_matmul(x_SD, w_gate_up_EDH, size_E, "tpu"), 2, axis=-1)
  y_SD = grouped_matmul(jax.nn.silu(gate_SF) * up_SF, w_down_EFD, size_E, "tpu")
  return weight_S[:, None] * y_SD


@pytest.mark.parametrize("dtype,tolerance", [("float32", 1e-5), ("bfloat16", 2**-6)])
def test_equals_the_separate_products_forward_and_gradient(dtype, tolerance):
  keys = jax.random.split(jax.random.key(0), 5)
  shapes = ((N_ROWS + SPARE_ROWS, D), (len(SIZES), D, 2 * F), (len(SIZES), F, D))
  arrays = [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=False)]
  arrays.insert(1, jax.random.uniform(keys[4], (N_ROWS + SPARE_ROWS,)))
  scale_ND = jax.random.normal(keys[3], (N_ROWS, D))

  def run(function, arrays):
    def loss(*arrays):
      y_ND = function(*arrays, jnp.asarray(SIZES, jnp.int32))[:N_ROWS].astype(jnp.float32)
      return (y_ND * scale_ND).sum(), y_ND
    (_, y_ND), grads = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True))(*arrays)
    return [y_ND, grads[0][:N_ROWS], grads[1][:N_ROWS], *grads[2:]]

  truth = run(separate_products, [x.astype(jnp.float32) for x in arrays])
  for ours, true in zip(run(swiglu_blocks, arrays), truth, strict=True):
    assert np.linalg.norm(np.float32(ours) - true) <= tolerance * np.linalg.norm(true)


def test_the_weights_gradients_are_summed_over_blocks_in_float32():
  """Of positive numbers: in bfloat16, each of 32 blocks would add its own rounding."""
  n_rows, rng = 8192, np.random.default_rng(0)

  def positive(*shape):
    return jnp.asarray(rng.uniform(0.5, 1.5, shape), jnp.bfloat16)

  x_SD, dy_SD = (jnp.pad(positive(n_rows, D), ((0, SPARE_ROWS), (0, 0))) for _ in range(2))
  weights = positive(1, D, 2 * F) / 4, positive(1, F, D)

  def blocks(w_gate_up_EDH, w_down_EFD):
    return swiglu_blocks(x_SD, jnp.ones(len(x_SD)), w_gate_up_EDH, w_down_EFD,
                         jnp.array([n_rows]))

  def plain(w_gate_up_EDH, w_down_EFD):
    gate_SF, up_SF = jnp.split(x_SD.astype(jnp.float32) @ w_gate_up_EDH[0], 2, axis=-1)
    return (jax.nn.silu(gate_SF) * up_SF) @ w_down_EFD[0]

  ours = jax.vjp(blocks, *weights)[1](dy_SD)
  truth = jax.vjp(plain, *(w.astype(jnp.float32) for w in weights))[1](dy_SD.astype(jnp.float32))
  for grad, true in zip(ours, truth, strict=True):
    # The rounding of the sum; those of the rows cancel.
    np.testing.assert_allclose(np.float32(grad), true, rtol=1.1 * 2**-8)


def test_blocks_of_bfloat16_are_read_as_bits():
  """XLA's CPU compiler would convert whole arrays to float32 to slice a block out of them."""
  arrays = (jnp.ones((N_ROWS + SPARE_ROWS, D), jnp.bfloat16), jnp.ones(N_ROWS + SPARE_ROWS),
            jnp.ones((len(SIZES), D, 2 * F), jnp.bfloat16),
            jnp.ones((len(SIZES), F, D), jnp.bfloat16))

  def gradient(*arrays):
    return jax.grad(lambda *arrays: swiglu_blocks(*arrays, jnp.asarray(SIZES)).sum(),
                    (0, 1, 2, 3))(*arrays)

  sliced = re.findall(r":(\w+)\[[\d,]*\] = dynamic_slice\[", str(jax.make_jaxpr(gradient)(*arrays)))
  assert "u16" in sliced and "bf16" not in sliced
