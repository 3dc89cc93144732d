"""Devices -> mesh; logical axes of parameters -> shardings. One table, for every parameter."""

import math

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax.config import RunConfig, resolve_mesh

DATA, FSDP, EXPERT = MESH_AXES = ("data", "fsdp", "expert")

# The batch is split over all axes: outside the MoE layer `expert` is more data parallelism.
BATCH_AXES = MESH_AXES

# Logical axis of a parameter -> mesh axes it is split over. The width of the experts' weights
# leaves `expert` to the experts themselves. What is not listed is not split.
RULES = {
    "experts": (EXPERT,),
    "expert_width": (FSDP,),
    "width": (FSDP, EXPERT),
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
  if n_slices == 1:
    return jax.make_mesh((data, fsdp, expert), MESH_AXES, devices=devices, axis_types=types)
  laid_out = mesh_utils.create_hybrid_device_mesh(
      (data // n_slices, fsdp, expert), (n_slices, 1, 1), devices,
      allow_split_physical_axes=True)
  return Mesh(laid_out, MESH_AXES, axis_types=types)


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
