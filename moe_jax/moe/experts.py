"""SwiGLU experts: their weights, and their forward pass on dense or grouped rows."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.moe.grouped_matmul import grouped_matmul
from moe_jax.moe.swiglu_blocks import swiglu_blocks
from moe_jax.products import cpu_matmul, precision_of


class Experts(NamedTuple):
  """Weights of bias-free SwiGLU experts: w_down(silu(x w_gate) * (x w_up))."""

  w_gate_EDF: jax.Array
  w_up_EDF: jax.Array
  w_down_EFD: jax.Array


# Logical axes of the experts' weights, which mesh.RULES maps to mesh axes.
EXPERT_AXES = Experts(("experts", "expert_d_model", None), ("experts", "expert_d_model", None),
                      ("experts", None, "expert_d_model"))


def swiglu(x_ERD: jax.Array, weight_ER: jax.Array | None = None, *, experts: Experts,
           platform: str) -> jax.Array:
  """y_ERD: runs each expert on its R rows and scales each row by its weight, if given.

  Computes in the dtype of the rows; float32 products have full precision. `platform` ("cpu", "gpu"
  or "tpu") selects the implementation.
  """
  matmul = cpu_matmul if platform == "cpu" else functools.partial(
      jnp.matmul, precision=precision_of(x_ERD.dtype, platform))
  gate_EDF, up_EDF, down_EFD = (w.astype(x_ERD.dtype) for w in experts)
  # One product for gate and up, so that the rows are read once.
  gate_up_ERF = matmul(x_ERD, jnp.concatenate([gate_EDF, up_EDF], axis=-1))
  return matmul(gated(*jnp.split(gate_up_ERF, 2, axis=-1), weight_ER), down_EFD)


def grouped_swiglu(x_SD: jax.Array, weight_S: jax.Array, size_E: jax.Array, experts: Experts,
                   platform: str, usual_rows: int | None = None) -> jax.Array:
  """y_SD: `swiglu` on rows sorted by expert, in the layout of grouped_matmul.py.

  Args:
    x_SD: rows.
    weight_S: float32, the weight that scales each output row.
    size_E: int32, number of rows of each expert.
    experts: the experts' weights.
    platform: of the devices.
    usual_rows: average number of rows in use, if S is sized for the worst case.
  """
  gate_EDF, up_EDF, down_EFD = (w.astype(x_SD.dtype) for w in experts)
  gate_up_EDH = jnp.concatenate([gate_EDF, up_EDF], axis=-1)
  if platform == "cpu":
    return swiglu_blocks(x_SD, weight_S, gate_up_EDH, down_EFD, size_E)
  multiply = functools.partial(grouped_matmul, size_E=size_E, platform=platform,
                               usual_rows=usual_rows)
  gate_up_SH = multiply(x_SD, gate_up_EDH)
  return multiply(gated(*jnp.split(gate_up_SH, 2, axis=-1), weight_S), down_EFD)


def gated(gate: jax.Array, up: jax.Array, weight: jax.Array | None = None) -> jax.Array:
  """silu(gate) * up * weight, computed in float32 and rounded once to the dtype of `gate`.

  The row weight is applied before the down projection, not after it: the gradient of the weights
  then does not need that projection's output, so it is neither saved nor recomputed.
  """
  hidden = jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)
  if weight is not None:
    hidden *= weight[..., None]
  return hidden.astype(gate.dtype)
