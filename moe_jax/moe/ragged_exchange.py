"""Ragged all-to-all: sends each row to the device that holds its expert, and back.

A device's rows are sorted by expert. It sends each expert's rows as one slice to the expert's
device, which stores the slices it receives by expert, then by sending device. So the rows need no
sorting on arrival.

Arrays have static shapes and nothing may be dropped, so the receive buffer is sized for the worst
case, in which all tokens of all devices along the axis go to this device's experts.
That is devices * T * min(K, e) rows, up to `devices` times the average. Unused rows
cost memory but no compute.

Offsets and sizes are computed once, for `jax.lax.ragged_all_to_all` (compiled for TPU, but never
run there or on GPUs). CPUs do not support it: there an emulation uses the same offsets and sizes,
all-gathers the rows and picks those sent to this device.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Slices(NamedTuple):
  """The slices one device sends and receives, in the argument order of ragged_all_to_all.

  There are e slices for each of the P devices along the axis, numbered by the other device first.

  Attributes:
    send_start: int32 [P * e], offset of each sent slice on this device.
    send_size: int32 [P * e], size of each sent slice.
    arrive_start: int32 [P * e], offset of each sent slice on the receiving device.
    receive_size: int32 [P * e], size of each received slice.
  """

  send_start: jax.Array
  send_size: jax.Array
  arrive_start: jax.Array
  receive_size: jax.Array


class Plan(NamedTuple):
  """The exchange to the experts, its inverse, and the number of rows of each local expert."""

  there: Slices
  back: Slices
  size_e: jax.Array


def plan_exchange(size_PE: jax.Array, device: jax.Array | int) -> Plan:
  """Plans the exchange for one of P devices.

  Args:
    size_PE: number of rows that each device has for each expert.
    device: index of this device.
  """
  n_devices, n_exp = size_PE.shape
  e = n_exp // n_devices
  # Offset of each slice on the sending device (home) and on the expert's device (away).
  home_PE = jnp.cumsum(size_PE, axis=1) - size_PE
  group_Pe = size_PE.sum(0).reshape(n_devices, e)
  group_Pe = jnp.cumsum(group_Pe, axis=1) - group_Pe
  away_PE = group_Pe.ravel() + jnp.cumsum(size_PE, axis=0) - size_PE

  def of_my_experts(x_PE):
    return jax.lax.dynamic_slice_in_dim(x_PE, device * e, e, axis=1)

  size_Pe = of_my_experts(size_PE)
  sent_E, arriving_E = size_PE[device], size_Pe.ravel()
  there = Slices(home_PE[device], sent_E, away_PE[device], arriving_E)
  back = Slices(of_my_experts(away_PE).ravel(), arriving_E, of_my_experts(home_PE).ravel(),
                sent_E)
  return Plan(there, back, size_Pe.sum(0))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def exchange(x_SD: jax.Array, way: Slices, way_back: Slices, n_rows: int, axis_name: str,
             platform: str) -> jax.Array:
  """y_RD: the rows received by this device, padded with zeros.

  The gradient is the inverse exchange: each row goes to exactly one place, so no sum is needed.

  Args:
    x_SD: rows, or scalars [S], varying over the axis.
    way, way_back: `there` and `back` of a Plan, or `back` and `there`.
    n_rows: R, size of the receive buffer.
    axis_name: the mesh axis over which devices exchange.
    platform: of the devices.
  """
  move = _stand_in if platform == "cpu" else _native
  return move(x_SD, way, n_rows, axis_name)


def _exchange_fwd(x_SD, way, way_back, n_rows, axis_name, platform):
  y_RD = exchange(x_SD, way, way_back, n_rows, axis_name, platform)
  return y_RD, (way, way_back, x_SD.shape[0])


def _exchange_bwd(n_rows, axis_name, platform, residuals, dy_RD):
  way, way_back, n_sent = residuals
  return exchange(dy_RD, way_back, way, n_sent, axis_name, platform), None, None


exchange.defvjp(_exchange_fwd, _exchange_bwd)


def _native(x_SD, way, n_rows, axis_name):
  zeros_RD = jnp.zeros_like(x_SD, shape=(n_rows, *x_SD.shape[1:]))
  return jax.lax.ragged_all_to_all(x_SD, zeros_RD, *way, axis_name=axis_name)


def _stand_in(x_SD, way, n_rows, axis_name):
  """Emulates ragged_all_to_all with all_gather."""
  x_PSD = jax.lax.all_gather(x_SD, axis_name)
  way = jax.tree.map(lambda x: jax.lax.all_gather(x, axis_name), way)
  n_devices = x_PSD.shape[0]
  e = way.send_size.shape[1] // n_devices
  first = jax.lax.axis_index(axis_name) * e

  def sent_here(numbers):
    return jax.lax.dynamic_slice_in_dim(numbers, first, e, axis=1)

  size = sent_here(way.send_size).ravel()
  row_S = jnp.arange(n_devices)[:, None] * x_SD.shape[0] + sent_here(way.send_start)
  index_R = slice_index(row_S.ravel(), sent_here(way.arrive_start).ravel(), size, n_rows)
  return x_PSD.reshape(-1, *x_SD.shape[1:]).at[index_R].get(mode="fill", fill_value=0)


def slice_index(source: jax.Array, target: jax.Array, size: jax.Array,
                n_rows: int) -> jax.Array:
  """index_R: the source row of each row of the result; the largest int32 where there is none.

  Slice i is copied from offset source[i] to offset target[i] and has size[i] rows.
  """
  begin = jnp.where(size > 0, target, n_rows)  # an empty slice may share its offset with another
  order = jnp.argsort(begin)
  row_R = jnp.arange(n_rows, dtype=jnp.int32)
  last_R = jnp.searchsorted(begin[order], row_R, side="right") - 1
  slice_R = order.at[last_R].get(mode="clip")
  offset_R = row_R - target[slice_R]
  inside_R = (last_R >= 0) & (offset_R < size[slice_R])
  return jnp.where(inside_R, source[slice_R] + offset_R, jnp.iinfo(jnp.int32).max)
