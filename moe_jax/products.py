"""Matrix products in the forms that XLA's CPU compiler runs fast.

Its library multiplies a row-major first factor with a matrix in either layout. It has no kernel
for a transposed first factor, which is what the gradient of weights needs (the fallback takes half
as long again), and it multiplies in bfloat16, twice as fast as in float32, only if the result is
requested in float32; otherwise it converts everything (JAX 0.10.2).
"""

import functools
import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from moe_jax.mesh import platform_of

_FEW_ROWS = 64  # not measured: decoding batches are below, training batches far above


def precision_of(dtype: jnp.dtype, platform: str) -> jax.lax.Precision | None:
  """The precision argument that keeps float32 products in float32, which accelerators would round.

  A CPU does not round, and has no fast kernel for an explicit precision.
  """
  told = dtype == jnp.float32 and platform != "cpu"
  return jax.lax.Precision.HIGHEST if told else None


# Accumulates and returns float32 on every platform; the caller rounds to bfloat16 if needed.
einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def turned(x: jax.Array) -> jax.Array:
  """Transposes the last two axes of x in memory, for use as a first factor.

  XLA would fold a plain transpose into the product again; the barrier prevents that, and the
  leading axis of size 1 keeps XLA from seeing through the barrier.
  """
  return jax.lax.optimization_barrier(x[None].swapaxes(-1, -2))[0]


def multiply(x: jax.Array, w: jax.Array, mesh: Mesh, axes: int = 1) -> jax.Array:
  """Contracts the last `axes` axes of x with the first `axes` axes of w, in the dtype of both.

  Args:
    x: activations; their other axes come first in the result.
    w: weights, of the dtype of x.
    mesh: the platform of its devices selects the implementation.
    axes: number of axes to contract.
  """
  platform = platform_of(mesh)
  if platform != "cpu":
    return jnp.tensordot(x, w, axes, precision=precision_of(x.dtype, platform))
  inner = math.prod(w.shape[:axes])
  y_TF = cpu_matmul(x.reshape(-1, inner), w.reshape(inner, -1))
  return y_TF.reshape(*x.shape[:-axes], *w.shape[axes:])


def multiply_each(x: jax.Array, weights: Sequence[jax.Array], mesh: Mesh) -> list[jax.Array]:
  """`multiply` by several weights; on a CPU as one product, which reads x once.

  Few rows, as in decoding, are multiplied by one weight at a time, since concatenating the weights
  would be most of the work.
  """
  if platform_of(mesh) != "cpu" or x.size // x.shape[-1] < _FEW_ROWS:
    return [multiply(x, w, mesh) for w in weights]
  y = multiply(x, jnp.concatenate([w.reshape(len(w), -1) for w in weights], axis=1), mesh)
  ends = itertools.accumulate(w.size // len(w) for w in weights[:-1])
  return [part.reshape(*x.shape[:-1], *w.shape[1:])
          for part, w in zip(jnp.split(y, list(ends), axis=-1), weights, strict=True)]


@jax.custom_vjp
def cpu_matmul(x_TD: jax.Array, w_DF: jax.Array) -> jax.Array:
  """x @ w in the dtype of both; leading axes are batch axes of both."""
  return _product(x_TD, w_DF)


def _product(x_TD, w_DF):
  return einsum("...td,...df->...tf", x_TD, w_DF).astype(x_TD.dtype)


def _fwd(x_TD, w_DF):
  return _product(x_TD, w_DF), (x_TD, w_DF)  # not cpu_matmul, so that remat policies see the dot


def _bwd(residuals, dy_TF):
  x_TD, w_DF = residuals
  dx_TD = einsum("...tf,...df->...td", dy_TF, w_DF).astype(x_TD.dtype)
  return dx_TD, einsum("...dt,...tf->...df", turned(x_TD), dy_TF).astype(w_DF.dtype)


cpu_matmul.defvjp(_fwd, _bwd)
