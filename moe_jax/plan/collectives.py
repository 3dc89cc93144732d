"""Lower bounds on the time of a collective: its bytes over the links of its mesh axes.

The formulas are for a torus with every link always busy and no latency. With n devices in a group,
B bytes of the whole (gathered or unreduced) array on each device, and w bytes/s one way over one
link (r links per dimension: 2 if it wraps, 1 if it does not; dims dimensions that the group spans):

    all-gather, reduce-scatter   B (n - 1) / n / (w r dims)
    all-reduce                   twice that
    all-to-all                   B e / (4 w r), e the longest extent of the group: half of all
                                 bytes cross its bisection
    collective-permute           B / w

Where a chip is several devices (tpu7x), n is the number of chips, and w is shared: by all devices
of a chip in an all-to-all, by those that send to other chips in a permute, and by the groups that
run on the same chips in the others. Between slices the data-center network replaces the links.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from moe_jax.plan.hlo import Computation, Instruction, Module
from moe_jax.plan.topology import Topology

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all",
         "collective-permute")


@dataclasses.dataclass(frozen=True)
class Devices:
  """Physical positions of the devices of a mesh.

  Attributes:
    axes: mesh axis -> size, in mesh order.
    coordinates: [devices, dimensions], the chip of each device in mesh order.
    slices: [devices], the slice of each device in mesh order.
  """

  axes: Mapping[str, int]
  coordinates: np.ndarray
  slices: np.ndarray

  @classmethod
  def of(cls, mesh) -> "Devices":
    devices = list(mesh.devices.flat)
    coordinates = np.array([getattr(device, "coords", (i,)) for i, device in enumerate(devices)])
    slices = np.array([getattr(device, "slice_index", 0) for device in devices])
    return cls(dict(mesh.shape), coordinates, slices)


def kind_of(instruction: Instruction) -> str | None:
  """Returns which of KINDS an instruction is or starts asynchronously, or None."""
  opcode = instruction.opcode.removesuffix("-start")
  return opcode if opcode in KINDS else None


class FusedTransfer(NamedTuple):
  """One end of a collective that XLA:TPU starts in one fusion and awaits in another.

  Attributes:
    starts: whether this is the end that starts it.
    chain: id that both ends share within their computation.
    computation: the computation that the fusion calls.
    collective: the collective instruction inside it, the same at both ends.
  """

  starts: bool
  chain: str
  computation: Computation
  collective: Instruction


def fused_transfer(module: Module, fusion: Instruction) -> FusedTransfer | None:
  """Returns the transfer that a fusion starts or awaits, or None for all other instructions."""
  if fusion.opcode != "fusion":
    return None
  inside = module.computations[fusion.called("calls")]
  target = re.search(r'custom_call_target="AsyncCollective(Start|Done)"', inside.root.attributes)
  if target is None:
    return None
  collective = next(i for i in inside.instructions if kind_of(i))
  chain = re.search(r'chain_id="(\d+)"', collective.attributes)
  return FusedTransfer(target[1] == "Start", chain[1], inside, collective)


def moved_bytes(kind: str, computation: Computation, instruction: Instruction) -> int:
  """B of the formulas: bytes on one device of the larger of operands and result.

  For a ragged all-to-all it is the smaller: rows are sent once, while the receive buffer is sized
  for the worst case.
  """
  if kind == "ragged-all-to-all":
    return min(computation.operand(instruction, index).bytes for index in (0, 1))
  operands = computation.operand_bytes(instruction)
  if instruction.opcode.endswith("-start"):  # its result tuple holds the operands, too
    return max(operands, sum(array.bytes for array in instruction.type) - operands)
  return max(operands, sum(array.bytes for array in instruction.type))


def groups_of(attributes: str, n_devices: int) -> np.ndarray:
  """[groups, size]: the groups of a collective, as device indices in mesh order.

  Raises:
    ValueError: the notation is unknown; falling back to all devices would misprice it.
  """
  mesh = re.search(r"replica_groups=mesh\[([^\]]*)\]"
                   r"(?:, device_ids=\(\[([0-9,]+)\](?:T\(([0-9,]+)\))?\))? *\{([^}]*)\}",
                   attributes)
  if mesh:
    sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
    names, used = list(sizes), re.findall(r"'([^']+)'", mesh[4])
    ids = _iota(n_devices, mesh[2] or str(n_devices), mesh[3])
    grid = ids.reshape([int(sizes[name]) for name in names])
    order = ([i for i, name in enumerate(names) if name not in used]
             + [names.index(name) for name in used])
    return grid.transpose(order).reshape(-1, math.prod(int(sizes[name]) for name in used))
  iota = re.search(r"replica_groups=\[([0-9,]+)\]<=\[([0-9,]+)\](?:T\(([0-9,]+)\))?", attributes)
  if iota:
    return _iota(n_devices, iota[2], iota[3]).reshape(_integers(iota[1]))
  explicit = re.search(r"replica_groups=\{(\{[^=]*?\})\}", attributes)
  if explicit:
    return np.array([_integers(group) for group in re.findall(r"\{([0-9,]+)\}", explicit[1])])
  pairs = re.search(r"source_target_pairs=\{(\{[^=]*?\})\}", attributes)
  if pairs:
    return np.array([_integers(pair) for pair in re.findall(r"\{([0-9,]+)\}", pairs[1])])
  unknown = re.search(r"replica_groups=(?!\{\}).{0,80}|source_target_pairs=.{0,80}", attributes)
  if unknown:
    raise ValueError(f"groups in an unknown notation: {unknown[0]}")
  return np.arange(n_devices)[None]  # no groups given: all devices


def _iota(n_devices: int, sizes: str, order: str | None) -> np.ndarray:
  """XLA's `[sizes]T(order)`: device ids reshaped to `sizes`, then transposed by `order`."""
  ids = np.arange(n_devices).reshape(_integers(sizes))
  return ids.transpose(_integers(order)) if order else ids


def axes_of(groups: np.ndarray, axes: Mapping[str, int]) -> str:
  """The mesh axes over which the groups communicate, e.g. `expert` or `fsdp+expert`.

  The smallest set such that no other axis varies within any group; axes of size 1 are omitted.
  """
  names = [name for name, size in axes.items() if size > 1]
  position = np.stack(np.unravel_index(np.arange(math.prod(axes.values())),
                                       tuple(axes.values())))
  rows = dict(zip(axes, position, strict=True))
  for n in range(len(names) + 1):
    for chosen in itertools.combinations(names, n):
      others = [name for name in names if name not in chosen]
      if all((rows[name][groups] == rows[name][groups[:, :1]]).all() for name in others):
        return "+".join(chosen) or "none"
  return "+".join(names)


def seconds(kind: str, n_bytes: int, groups: np.ndarray, devices: Devices,
            topology: Topology) -> float:
  """Lower bound on the time of one collective, over its slowest group."""
  if kind == "collective-permute":
    return _permute_seconds(n_bytes, groups, devices, topology)
  return max(_group_seconds(kind, n_bytes, group, devices, topology) for group in groups)


def _permute_seconds(n_bytes, pairs, devices, topology) -> float:
  source, target = pairs.T
  if (devices.slices[source] != devices.slices[target]).any():
    return n_bytes / topology.hardware.device_dcn_bytes_per_second
  chip = np.column_stack([devices.slices, devices.coordinates])
  away = (chip[source] != chip[target]).any(axis=1)
  if not away.any():  # within chips: no link is used
    return 0.0
  _, sending = np.unique(chip[source[away]], axis=0, return_counts=True)
  return n_bytes * int(sending.max()) / _link(topology)


def _group_seconds(kind, n_bytes, group, devices, topology) -> float:
  size = len(group)
  if size == 1:
    return 0.0
  network = topology.hardware.device_dcn_bytes_per_second
  n_slices = len(np.unique(devices.slices[group]))
  cores = topology.hardware.devices_per_chip
  if n_slices > 1:
    # What leaves a slice goes through each device's share of the network.
    share = n_bytes * (n_slices - 1) / n_slices
    each = share / max(1, size // n_slices) if kind == "all-reduce" else share
    return (2 if kind == "all-reduce" else 1) * each / network
  chips = devices.coordinates[group]
  extents = [len(np.unique(chips[:, axis])) for axis in range(chips.shape[1])]
  spanned = [axis for axis, extent in enumerate(extents) if extent > 1]
  if not spanned:  # cores of one chip: no link is used
    return 0.0
  ports = sum(2 if extents[axis] == topology.shape[axis] and topology.wraps(axis) else 1
              for axis in spanned)
  if "all-to-all" in kind:
    longest = max(spanned, key=lambda axis: extents[axis])
    closed = extents[longest] == topology.shape[longest] and topology.wraps(longest)
    return cores * n_bytes * extents[longest] / (4 * (2 if closed else 1) * _link(topology))
  passes = 2 if kind == "all-reduce" else 1
  n_chips = len(np.unique(chips, axis=0))
  sharing = cores * n_chips / size  # groups at work on the same chips
  return passes * sharing * n_bytes * (n_chips - 1) / n_chips / (ports * _link(topology))


def _link(topology: Topology) -> float:
  """Bytes/s over one link, one way. A chip has two links per dimension of the torus."""
  return topology.hardware.link_bytes_per_second / (2 * len(topology.shape))


def _integers(text: str) -> list[int]:
  return [int(number) for number in text.strip("{}").split(",")]
