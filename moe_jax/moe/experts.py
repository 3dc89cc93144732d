"""SwiGLU experts: their weights, and how each runs on its rows."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.moe.grouped_matmul import grouped_matmul
from moe_jax.moe.swiglu_blocks import swiglu_blocks
from moe_jax.products import cpu_matmul, precision_of


class Experts(NamedTuple):
  """Weights of SwiGLU experts without bias: w_down(silu(x w_gate) * (x w_up))."""

  w_gate_EDF: jax.Array
  w_up_EDF: jax.Array
  w_down_EFD: jax.Array


# Logical axes of the experts' weights, which mesh.RULES maps to the mesh.
EXPERT_AXES = Experts(("experts", "expert_d_model", None), ("experts", "expert_d_model", None),
                      ("experts", None, "expert_d_model"))


def swiglu(x_ERD: jax.Array, weight_ER: jax.Array | None = None, *, experts: Experts,
           platform: str) -> jax.Array:
  """y_ERD: each expert on its R rows, each row times its weight where there are weights.

  In the type of the rows; products of float32 have its full precision. How it is done depends on
  the platform of the devices, "cpu", "gpu" or "tpu".
  """
  matmul = cpu_matmul if platform == "cpu" else functools.partial(
      jnp.matmul, precision=precision_of(x_ERD.dtype, platform))
  gate_EDF, up_EDF, down_EFD = (w.astype(x_ERD.dtype) for w in experts)
  # Side by side, so that the rows are read once for both.
  gate_up_ERF = matmul(x_ERD, jnp.concatenate([gate_EDF, up_EDF], axis=-1))
  return matmul(gated(*jnp.split(gate_up_ERF, 2, axis=-1), weight_ER), down_EFD)


def grouped_swiglu(x_SD: jax.Array, weight_S: jax.Array, size_E: jax.Array, experts: Experts,
                   platform: str, usual_rows: int | None = None) -> jax.Array:
  """y_SD: `swiglu` on rows sorted by expert, in the layout of grouped_matmul.py.

  Args:
    x_SD: rows.
    weight_S: float32, what each row of the result is multiplied by.
    size_E: int32, rows of each expert.
    experts: their weights.
    platform: of the devices.
    usual_rows: how many of the S rows are in use on average, where S has room for the worst case.
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
  """silu(gate) * up, times the row's weight, in float32 and rounded once to their type.

  The weight enters before the last product and not after it: the gradient of the weights then
  needs no output of that product, which need not be kept nor computed again.
  """
  hidden = jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)
  if weight is not None:
    hidden *= weight[..., None]
  return hidden.astype(gate.dtype)
