"""SwiGLU of rows sorted by expert, all of it in one loop over blocks of one expert's rows.

What `grouped_swiglu` does with two grouped products, for CPUs: there a block's hidden units stay
in the cache between the products, and nothing but its input is kept for the backward pass.
"""

import functools

import jax
import jax.numpy as jnp

from moe_jax.moe.grouped_matmul import blocks_of

_ROWS = 256  # in a block; less wastes time on small products, more on rows of other experts


@jax.custom_vjp
def swiglu_blocks(x_SD: jax.Array, weight_S: jax.Array, w_gate_up_EDH: jax.Array,
                  w_down_EFD: jax.Array, size_E: jax.Array) -> jax.Array:
  """y_SD: w_down(weight * silu(x w_gate) * (x w_up)) of each row's expert, computed in float32.

  Args:
    x_SD: rows in the layout of grouped_matmul.py.
    weight_S: float32, of each row.
    w_gate_up_EDH: gate and up side by side, H = 2 F, of the type of the rows.
    w_down_EFD: of the type of the rows.
    size_E: int32, rows in each group.
  """
  return _forward(x_SD, weight_S, w_gate_up_EDH, w_down_EFD, size_E)


def _forward(x_SD, weight_S, w_gate_up_EDH, w_down_EFD, size_E):
  blocks, dtype = blocks_of(x_SD.shape[0], size_E, _ROWS), x_SD.dtype
  # XLA's CPU compiler multiplies in float32 only: in the loop it would convert each time round.
  x_SD, w_gate_up_EDH, w_down_EFD = _float32(x_SD, w_gate_up_EDH, w_down_EFD)

  def run(j, y_SD):
    expert, start = blocks.expert_J[j], blocks.start_J[j]
    x_RD = jax.lax.dynamic_slice_in_dim(x_SD, start, _ROWS)
    gate_RF, up_RF = jnp.split(_multiply(x_RD, w_gate_up_EDH[expert]), 2, axis=-1)
    weight_R1 = jax.lax.dynamic_slice_in_dim(weight_S, start, _ROWS)[:, None]
    hidden_RF = _rounded(jax.nn.silu(gate_RF) * up_RF * weight_R1, dtype)
    y_RD = _multiply(hidden_RF, w_down_EFD[expert])
    # Rows of the experts after this one are overwritten when their own blocks come, later.
    return jax.lax.dynamic_update_slice_in_dim(y_SD, y_RD, start, axis=0)

  return jax.lax.fori_loop(0, blocks.n_used, run, jnp.zeros_like(x_SD)).astype(dtype)


def _fwd(*inputs):
  return _forward(*inputs), inputs


def _bwd(residuals, dy_SD):
  x_SD, weight_S, w_gate_up_EDH, w_down_EFD, size_E = residuals
  blocks, dtype = blocks_of(x_SD.shape[0], size_E, _ROWS), x_SD.dtype
  x_SD, dy_SD, w_gate_up_EDH, w_down_EFD = _float32(x_SD, dy_SD, w_gate_up_EDH, w_down_EFD)
  w_gate_up_EHD, w_down_EDF = w_gate_up_EDH.swapaxes(1, 2), w_down_EFD.swapaxes(1, 2)

  def run(j, sums):
    dx_SD, dweight_S, dgate_up_EDH, ddown_EFD = sums
    expert, start = blocks.expert_J[j], blocks.start_J[j]
    inside_R1 = (jnp.arange(_ROWS) < blocks.inside_J[j])[:, None]
    x_RD = jax.lax.dynamic_slice_in_dim(x_SD, start, _ROWS)
    dy_RD = jnp.where(inside_R1, jax.lax.dynamic_slice_in_dim(dy_SD, start, _ROWS), 0)
    gate_RF, up_RF = jnp.split(_multiply(x_RD, w_gate_up_EDH[expert]), 2, axis=-1)
    sigmoid_RF = jax.nn.sigmoid(gate_RF)
    silu_RF = gate_RF * sigmoid_RF
    weight_R1 = jax.lax.dynamic_slice_in_dim(weight_S, start, _ROWS)[:, None]
    dweighted_RF = _multiply(dy_RD, w_down_EDF[expert])
    dweight_R = (dweighted_RF * silu_RF * up_RF).sum(-1)
    dhidden_RF = dweighted_RF * weight_R1
    dgate_RF = dhidden_RF * up_RF * (sigmoid_RF + silu_RF * (1 - sigmoid_RF))
    dgate_up_RH = _rounded(jnp.concatenate([dgate_RF, dhidden_RF * silu_RF], axis=-1), dtype)
    dx_RD = _multiply(dgate_up_RH, w_gate_up_EHD[expert])
    hidden_RF = _rounded(silu_RF * up_RF * weight_R1, dtype)
    return (jax.lax.dynamic_update_slice_in_dim(dx_SD, dx_RD, start, axis=0),
            jax.lax.dynamic_update_slice_in_dim(dweight_S, dweight_R, start, axis=0),
            dgate_up_EDH.at[expert].add(_multiply(x_RD.T, dgate_up_RH)),
            ddown_EFD.at[expert].add(_multiply(hidden_RF.T, dy_RD)))

  sums = jax.tree.map(jnp.zeros_like, (x_SD, weight_S, w_gate_up_EDH, w_down_EFD))
  dx_SD, dweight_S, *dweights = jax.lax.fori_loop(0, blocks.n_used, run, sums)
  dgate_up_EDH, ddown_EFD = (dweight.astype(dtype) for dweight in dweights)
  return dx_SD.astype(dtype), dweight_S, dgate_up_EDH, ddown_EFD, None


swiglu_blocks.defvjp(_fwd, _bwd)

_multiply = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def _float32(*arrays):
  return [x.astype(jnp.float32) for x in arrays]


def _rounded(x, dtype):
  """As the separate products round what lies between them."""
  return x.astype(dtype).astype(jnp.float32)
