"""bfloat16 as 16-bit integers, which XLA's CPU compiler slices and updates in place.

To read or write part of a bfloat16 array that compiler converts the whole array to float32 and
back (JAX 0.10.2). A scan over L layers that saves an array in each of them then converts L arrays
L times. Integers are copied as they are, and reinterpreting bits changes no value.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Bits(NamedTuple):
  """A bfloat16 array, reinterpreted as uint16."""

  bits: jax.Array


def to_bits(x: jax.Array) -> jax.Array | Bits:
  """The bits of a bfloat16 array; any other array as it is."""
  if x.dtype != jnp.bfloat16:
    return x
  return Bits(jax.lax.bitcast_convert_type(x, jnp.uint16))


def from_bits(x: jax.Array | Bits) -> jax.Array:
  """Undoes `to_bits`."""
  return jax.lax.bitcast_convert_type(x.bits, jnp.bfloat16) if isinstance(x, Bits) else x


def part_of(x: jax.Array | Bits, part: Callable[[jax.Array], jax.Array]) -> jax.Array:
  """`part`, a slice or an index, of an array that went through `to_bits`."""
  return from_bits(jax.tree.map(part, x))


def saves_bits(function: Callable[..., Any]) -> Callable[..., Any]:
  """The same function, which saves bits for its backward pass wherever it would save bfloat16.

  For the body of a scan, which writes what its body saves into arrays with a leading layer axis.
  It has no forward-mode derivative.
  """

  @jax.custom_vjp
  def wrapped(*args):
    return function(*args)

  def fwd(*args):
    y, vjp = jax.vjp(function, *args)  # a pytree, whose leaves are what it saves
    return y, jax.tree.map(to_bits, vjp)

  def bwd(vjp, dy):
    return jax.tree.map(from_bits, vjp, is_leaf=lambda x: isinstance(x, Bits))(dy)

  wrapped.defvjp(fwd, bwd)
  return wrapped
