"""SwiGLU on rows sorted by expert, fused into one loop over blocks of rows, for CPUs.

Computes what `grouped_swiglu` computes with two grouped products. A block's hidden activations stay
in cache between the products, and only the inputs are saved for the backward pass.
"""

import jax
import jax.numpy as jnp

from moe_jax.bfloat16 import part_of, to_bits
from moe_jax.moe.grouped_matmul import SPARE_ROWS, blocks_of
from moe_jax.products import einsum, turned


@jax.custom_vjp
def swiglu_blocks(x_SD: jax.Array, weight_S: jax.Array, w_gate_up_EDH: jax.Array,
                  w_down_EFD: jax.Array, size_E: jax.Array) -> jax.Array:
  """y_SD: w_down(weight * silu(x w_gate) * (x w_up)) of each row's expert, summed in float32.

  Args:
    x_SD: rows in the layout of grouped_matmul.py.
    weight_S: float32, the weight of each row.
    w_gate_up_EDH: gate and up concatenated, H = 2 F, of the dtype of the rows.
    w_down_EFD: of the dtype of the rows.
    size_E: int32, number of rows in each group.
  """
  blocks, dtype = _blocks(x_SD.shape[0], size_E), x_SD.dtype
  *rows, w_gate_up, w_down = map(to_bits, (x_SD, weight_S, w_gate_up_EDH, w_down_EFD))

  def run(j, y_SD):
    expert, start = blocks.expert_J[j], blocks.start_J[j]
    x_RD, weight_R = _block(rows, start, blocks.rows)
    w_gate_up_DH, w_down_FD = _of_expert((w_gate_up, w_down), expert)
    gate_RF, up_RF = jnp.split(einsum("rd,dh->rh", x_RD, w_gate_up_DH), 2, axis=-1)
    hidden_RF = (jax.nn.silu(gate_RF) * up_RF * weight_R[:, None]).astype(dtype)
    y_RD = einsum("rf,fd->rd", hidden_RF, w_down_FD)
    # The block's rows of later experts are overwritten by their own blocks.
    return jax.lax.dynamic_update_slice_in_dim(y_SD, y_RD, start, axis=0)

  return jax.lax.fori_loop(0, blocks.n_used, run, _zeros(x_SD)).astype(dtype)


def _fwd(*inputs):
  return swiglu_blocks(*inputs), inputs


def _bwd(residuals, dy_SD):
  x_SD, weight_S, w_gate_up_EDH, w_down_EFD, size_E = residuals
  blocks, dtype = _blocks(x_SD.shape[0], size_E), x_SD.dtype
  w_gate_up_EHD = turned(w_gate_up_EDH)
  *rows, w_gate_up, w_down = map(to_bits, (x_SD, dy_SD, weight_S, w_gate_up_EHD, w_down_EFD))

  def run(j, sums):
    dx_SD, dweight_S, dgate_up_EHD, ddown_EFD, dgate_up_HR = sums
    expert, start = blocks.expert_J[j], blocks.start_J[j]
    x_RD, dy_RD, weight_R = _block(rows, start, blocks.rows)
    w_gate_up_HD, w_down_FD = _of_expert((w_gate_up, w_down), expert)
    inside_R = jnp.arange(blocks.rows) < blocks.inside_J[j]
    # A weight of 0 zeroes all gradients from the block's rows of later experts.
    weight_R = jnp.where(inside_R, weight_R, 0)
    # Rows are the minor axis, so that no first factor has to be transposed for the weights'
    # gradients.
    gate_FR, up_FR = jnp.split(einsum("hd,rd->hr", w_gate_up_HD, x_RD), 2)
    sigmoid_FR = jax.nn.sigmoid(gate_FR)
    silu_FR = gate_FR * sigmoid_FR
    dweighted_FR = einsum("fd,rd->fr", w_down_FD, dy_RD)
    dweight_R = jnp.where(inside_R, (dweighted_FR * silu_FR * up_FR).sum(0), 0)
    dhidden_FR = dweighted_FR * weight_R
    dgate_FR = dhidden_FR * up_FR * (sigmoid_FR + silu_FR * (1 - sigmoid_FR))
    dgate_up_HR = dgate_up_HR.at[:f].set(dgate_FR).at[f:].set(dhidden_FR * silu_FR)
    both_HR = dgate_up_HR.astype(dtype)
    dx_RD = einsum("rh,hd->rd", turned(both_HR), w_gate_up_HD)
    hidden_FR = (silu_FR * up_FR * weight_R).astype(dtype)
    return (jax.lax.dynamic_update_slice_in_dim(dx_SD, dx_RD, start, axis=0),
            jax.lax.dynamic_update_slice_in_dim(dweight_S, dweight_R, start, axis=0),
            dgate_up_EHD.at[expert].add(einsum("hr,rd->hd", both_HR, x_RD)),
            ddown_EFD.at[expert].add(einsum("fr,rd->fd", hidden_FR, dy_RD)), dgate_up_HR)

  # The last entry is a buffer for the concatenated gradients of gate and up: for a concatenation
  # XLA's CPU compiler emits a branch per element, which took longer than any of the products.
  f = w_down_EFD.shape[1]
  side_by_side_HR = jnp.zeros_like(x_SD, shape=(2 * f, blocks.rows), dtype=jnp.float32)
  sums = (*map(_zeros, (x_SD, weight_S, w_gate_up_EHD, w_down_EFD)), side_by_side_HR)
  dx_SD, dweight_S, dgate_up_EHD, ddown_EFD, _ = jax.lax.fori_loop(0, blocks.n_used, run, sums)
  return (dx_SD.astype(dtype), dweight_S, dgate_up_EHD.swapaxes(1, 2).astype(dtype),
          ddown_EFD.astype(dtype), None)


swiglu_blocks.defvjp(_fwd, _bwd)


def _blocks(n_rows, size_E):
  """Blocks of about half the average group, a power of two from 32 to 256 rows.

  Smaller blocks waste time on small products, larger ones on rows of other experts.
  """
  half = (n_rows - SPARE_ROWS) // (2 * len(size_E))
  return blocks_of(n_rows, size_E, min(256, 1 << max(5, half.bit_length() - 1)))


def _zeros(x):
  """Float32 zeros to accumulate blocks in.

  To update part of a bfloat16 array, XLA's CPU compiler converts the whole array there and back.
  """
  return jnp.zeros_like(x, dtype=jnp.float32)


def _block(arrays, start, rows):
  return [part_of(x, lambda x: jax.lax.dynamic_slice_in_dim(x, start, rows)) for x in arrays]


def _of_expert(weights, expert):
  return [part_of(w, lambda w: w[expert]) for w in weights]
