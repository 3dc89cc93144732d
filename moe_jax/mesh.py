"""Devices -> mesh; logical axes of parameters -> shardings. One table, for every parameter."""

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

# The batch is split over all axes: outside the MoE layer `expert` is more data parallelism.
BATCH_AXES = MESH_AXES

# Logical axis of a parameter -> mesh axes it is split over. The d_model of the experts' weights
# leaves `expert` to the experts themselves. What is not listed is not split.
RULES = {
    "experts": (EXPERT,),
    "expert_d_model": (FSDP,),
    "d_model": (FSDP, EXPERT),
}


def make_mesh(config: RunConfig, devices: list[jax.Device] | None = None) -> Mesh:
  """The mesh that `config.execution.mesh` asks for, on all devices or on those given.

  Where the devices are several TPU slices, `data` runs over the slices first, and all else
  stays inside one: between slices there is only the data-centre network.

  Raises:
    FieldError: the mesh does not suit the devices, the architecture or the batch.
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
  # An axis may need a part of one of the torus: 8 chips of 4 x 4.
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
  """Devices [data, fsdp, expert] such that `expert` lies in blocks as near to cubes as there are.

  Half of all that an all-to-all moves crosses the middle of its block, so what counts is how
  long the block is: eight chips exchange in half the time as 2 x 2 x 2 that they take as 2 x 4.

  Args:
    places: of each device, its slice and its coordinates there; all slices alike and whole.
    data, fsdp, expert: sizes; `data` runs over the slices first.

  Returns:
    Indices of devices; None where the sizes do not divide the torus.
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
  # Each dimension of the torus, outermost first: data, fsdp, expert.
  split = grid.reshape(n_slices, *(part for parts in zip(*blocks[::-1], strict=True)
                                   for part in parts))
  axes = [0, *(1 + 3 * dimension + kind for kind in range(3) for dimension in range(len(extents)))]
  return split.transpose(axes).reshape(data, fsdp, expert)


def _near_cube(size: int, extents: list[int]) -> tuple[int, ...] | None:
  """Extents whose product is `size`, dividing those there are; the longest as short as can be."""
  divisors = [[n for n in range(1, extent + 1) if extent % n == 0 and size % n == 0]
              for extent in extents]
  blocks = [block for block in itertools.product(*divisors) if math.prod(block) == size]
  return min(blocks, key=lambda block: sorted(block, reverse=True), default=None)


def param_spec(axes: tuple[str | None, ...]) -> P:
  """How a parameter with these logical axes is split."""
  return P(*(RULES.get(axis) for axis in axes))


def batch_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
  """How an array is split whose dimension `axis` is the batch."""
  return NamedSharding(mesh, P(*(None,) * axis, BATCH_AXES))


def local_rows(sharding: NamedSharding, shape: tuple[int, ...], axis: int = 0) -> np.ndarray:
  """Numbers, ascending, of the rows along `axis` that the devices of this process hold."""
  held = sharding.addressable_devices_indices_map(shape).values()
  return np.unique(np.concatenate([np.arange(shape[axis])[index[axis]] for index in held]))


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, P())


def mesh_size(mesh: Mesh) -> int:
  return math.prod(mesh.shape.values())


def platform_of(mesh: Mesh) -> str:
  """`cpu`, `gpu` or `tpu`: decides how a thing is done, not what comes out."""
  return mesh.devices.flat[0].platform
