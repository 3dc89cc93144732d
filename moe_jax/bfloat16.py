"""bfloat16 as 16-bit integers, which XLA's CPU compiler slices and updates in place.

To read or write part of a bfloat16 array, that compiler converts the whole array to float32 and
back (JAX 0.10.2). A scan over L layers that saves an array per layer then converts L arrays L
times. Integers are copied as they are, and a bitcast changes no value.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Bits(NamedTuple):
  """A bfloat16 array, reinterpreted as uint16."""

  bits: jax.Array


def to_bits(x: jax.Array) -> jax.Array | Bits:
  """Bitcasts a bfloat16 array to uint16; returns any other array unchanged."""
  if x.dtype != jnp.bfloat16:
    return x
  return Bits(jax.lax.bitcast_convert_type(x, jnp.uint16))


def from_bits(x: jax.Array | Bits) -> jax.Array:
  """Undoes `to_bits`."""
  return jax.lax.bitcast_convert_type(x.bits, jnp.bfloat16) if isinstance(x, Bits) else x


def part_of(x: jax.Array | Bits, part: Callable[[jax.Array], jax.Array]) -> jax.Array:
  """Applies `part`, which slices or indexes, to an array that went through `to_bits`."""
  return from_bits(jax.tree.map(part, x))


def saves_bits(function: Callable[..., Any]) -> Callable[..., Any]:
  """Wraps `function` to save its bfloat16 residuals as bits.

  For the body of a scan, which writes the body's residuals into arrays with a leading layer axis.
  The result does not support forward-mode differentiation.
  """

  @jax.custom_vjp
  def wrapped(*args):
    return function(*args)

  def fwd(*args):
    y, vjp = jax.vjp(function, *args)  # vjp is a pytree whose leaves are the residuals
    return y, jax.tree.map(to_bits, vjp)

  def bwd(vjp, dy):
    return jax.tree.map(from_bits, vjp, is_leaf=lambda x: isinstance(x, Bits))(dy)

  wrapped.defvjp(fwd, bwd)
  return wrapped
