"""Matrix products in the forms that XLA's CPU compiler runs fast.

Its library multiplies rows that lie one after another with a matrix in either order. It has no
kernel for a first factor that lies transposed, which is what the gradient of weights asks for (the
fallback takes half as long again), and multiplies bfloat16 as such, twice as fast as float32, only
where the result is asked for in float32; else it converts everything (JAX 0.10.2).
"""

import functools
import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from moe_jax.mesh import platform_of

_FEW_ROWS = 64  # not measured: a batch of decoding is below, one of training far above


def precision_of(dtype: jnp.dtype, platform: str) -> jax.lax.Precision | None:
  """What makes a product of float32 be one: accelerators round its factors unless they are told.

  A CPU does not round, and has no fast kernel for what is asked for in so many words.
  """
  told = dtype == jnp.float32 and platform != "cpu"
  return jax.lax.Precision.HIGHEST if told else None


# The sum in float32, as every platform has it; what is to be bfloat16 is rounded by the caller.
einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def turned(x: jax.Array) -> jax.Array:
  """x with its last two axes swapped, in memory too: a first factor to multiply with.

  Swapped alone, it would become a product of a transposed factor again; the barrier keeps it from
  that, and the leading axis of one keeps XLA from seeing through the barrier.
  """
  return jax.lax.optimization_barrier(x[None].swapaxes(-1, -2))[0]


def multiply(x: jax.Array, w: jax.Array, mesh: Mesh, axes: int = 1) -> jax.Array:
  """Contracts the last `axes` axes of x with the first ones of w, in the type of x and w.

  Args:
    x: activations; what lies before the contracted axes stays in front.
    w: weights, of the type of x.
    mesh: of devices whose platform decides how it is done.
    axes: how many.
  """
  platform = platform_of(mesh)
  if platform != "cpu":
    return jnp.tensordot(x, w, axes, precision=precision_of(x.dtype, platform))
  inner = math.prod(w.shape[:axes])
  y_TF = cpu_matmul(x.reshape(-1, inner), w.reshape(inner, -1))
  return y_TF.reshape(*x.shape[:-axes], *w.shape[axes:])


def multiply_each(x: jax.Array, weights: Sequence[jax.Array], mesh: Mesh) -> list[jax.Array]:
  """`multiply` by several weights; on a CPU as one product, which reads x once.

  Few rows, as in decoding, are multiplied by one weight at a time: there laying the weights side by
  side would be most of the work.
  """
  if platform_of(mesh) != "cpu" or x.size // x.shape[-1] < _FEW_ROWS:
    return [multiply(x, w, mesh) for w in weights]
  y = multiply(x, jnp.concatenate([w.reshape(len(w), -1) for w in weights], axis=1), mesh)
  ends = itertools.accumulate(w.size // len(w) for w in weights[:-1])
  return [part.reshape(*x.shape[:-1], *w.shape[1:])
          for part, w in zip(jnp.split(y, list(ends), axis=-1), weights, strict=True)]


@jax.custom_vjp
def cpu_matmul(x_TD: jax.Array, w_DF: jax.Array) -> jax.Array:
  """x @ w in the type of both; axes in front of these are those of both."""
  return _product(x_TD, w_DF)


def _product(x_TD, w_DF):
  return einsum("...td,...df->...tf", x_TD, w_DF).astype(x_TD.dtype)


def _fwd(x_TD, w_DF):
  return _product(x_TD, w_DF), (x_TD, w_DF)  # in the open, where remat's policies see it


def _bwd(residuals, dy_TF):
  x_TD, w_DF = residuals
  dx_TD = einsum("...tf,...df->...td", dy_TF, w_DF).astype(x_TD.dtype)
  return dx_TD, einsum("...dt,...tf->...df", turned(x_TD), dy_TF).astype(w_DF.dtype)


cpu_matmul.defvjp(_fwd, _bwd)
