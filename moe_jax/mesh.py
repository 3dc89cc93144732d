"""Creates the device mesh and maps logical axes to shardings, by one table for all parameters."""

import itertools
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax.config import RunConfig, resolve_mesh

DATA, FSDP, EXPERT = MESH_AXES = ("data", "fsdp", "expert")

# The batch is split over all axes: outside the MoE layer, `expert` is data parallelism, too.
BATCH_AXES = MESH_AXES

# Logical axis of a parameter -> mesh axes it is split over. The experts' d_model is not split over
# `expert`, which their expert axis takes. Unlisted axes are not split.
RULES = {
    "experts": (EXPERT,),
    "expert_d_model": (FSDP,),
    "d_model": (FSDP, EXPERT),
}


def make_mesh(config: RunConfig, devices: list[jax.Device] | None = None) -> Mesh:
  """Creates the mesh of `config.execution.mesh`, on `devices` or on all devices.

  On several TPU slices, only `data` crosses slices (as its major part), because between slices
  there is only the data center network.

  Raises:
    FieldError: the mesh does not fit the devices, the architecture or the batch.
  """
  devices = jax.devices() if devices is None else devices
  n_slices = len({getattr(device, "slice_index", 0) for device in devices})
  data, fsdp, expert = resolve_mesh(config, len(devices), n_slices)
  types = (AxisType.Auto,) * len(MESH_AXES)
  if expert > 1 and all(device.platform == "tpu" for device in devices):
    order = torus_order([(getattr(device, "slice_index", 0), *device.coords,
                          getattr(device, "core_on_chip", 0)) for device in devices],
                        data, fsdp, expert)
    if order is not None:
      return Mesh(np.array(devices)[order], MESH_AXES, axis_types=types)
  # A mesh axis may need only part of a torus axis, e.g. 8 chips of 4 x 4.
  if n_slices == 1:
    laid_out = mesh_utils.create_device_mesh((data, fsdp, expert), devices,
                                             allow_split_physical_axes=True)
  else:
    laid_out = mesh_utils.create_hybrid_device_mesh(
        (data // n_slices, fsdp, expert), (n_slices, 1, 1), devices,
        allow_split_physical_axes=True)
  return Mesh(laid_out, MESH_AXES, axis_types=types)


def torus_order(places: Sequence[tuple[int, ...]], data: int, fsdp: int,
                expert: int) -> np.ndarray | None:
  """Orders devices as [data, fsdp, expert] such that `expert` spans blocks as cubic as possible.

  Half of the traffic of an all-to-all crosses the middle of its block, so what counts is the
  block's longest side: eight chips exchange twice as fast as 2 x 2 x 2 than as 2 x 4.

  Args:
    places: slice and coordinates within the slice of each device; slices are complete and equal.
    data, fsdp, expert: sizes of the mesh axes; slices are the major part of `data`.

  Returns:
    Indices of devices; None if the sizes do not divide the torus.
  """
  place_ND = np.array(places) - np.min(places, axis=0)
  n_slices, *extents = place_ND.max(axis=0) + 1
  if n_slices * math.prod(extents) != len(places) or data % n_slices:
    return None
  grid = np.empty((n_slices, *extents), int)
  grid[tuple(place_ND.T)] = np.arange(len(places))
  blocks, left = [], extents
  for size in (expert, fsdp, data // n_slices):
    block = _near_cube(size, left)
    if block is None:
      return None
    blocks.append(block)
    left = [extent // part for extent, part in zip(left, block, strict=True)]
  # Split each torus dimension into data, fsdp and expert, outermost first.
  split = grid.reshape(n_slices, *(part for parts in zip(*blocks[::-1], strict=True)
                                   for part in parts))
  axes = [0, *(1 + 3 * dimension + kind for kind in range(3) for dimension in range(len(extents)))]
  return split.transpose(axes).reshape(data, fsdp, expert)


def _near_cube(size: int, extents: list[int]) -> tuple[int, ...] | None:
  """Extents whose product is `size` and that divide `extents`, with the shortest longest side."""
  divisors = [[n for n in range(1, extent + 1) if extent % n == 0 and size % n == 0]
              for extent in extents]
  blocks = [block for block in itertools.product(*divisors) if math.prod(block) == size]
  return min(blocks, key=lambda block: sorted(block, reverse=True), default=None)


def param_spec(axes: tuple[str | None, ...]) -> P:
  """The PartitionSpec of a parameter with these logical axes."""
  return P(*(RULES.get(axis) for axis in axes))


def batch_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
  """The sharding of an array whose dimension `axis` is the batch."""
  return NamedSharding(mesh, P(*(None,) * axis, BATCH_AXES))


def local_rows(sharding: NamedSharding, shape: tuple[int, ...], axis: int = 0) -> np.ndarray:
  """Sorted indices of the rows along `axis` that the devices of this process hold."""
  held = sharding.addressable_devices_indices_map(shape).values()
  return np.unique(np.concatenate([np.arange(shape[axis])[index[axis]] for index in held]))


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, P())


def mesh_size(mesh: Mesh) -> int:
  return math.prod(mesh.shape.values())


def platform_of(mesh: Mesh) -> str:
  """`cpu`, `gpu` or `tpu`: selects implementations, without changing what they compute."""
  return mesh.devices.flat[0].platform
