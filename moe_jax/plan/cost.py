"""Estimates the time of one step from compiled HLO, accounting for loops and overlap.

XLA:TPU annotates most instructions with `estimated_cycles`. A plain sum of them is wrong in three
ways, which this walk corrects: a loop body is printed once but runs many times; what has no
estimate (gathers, Pallas kernels, collectives) is not free; an asynchronous operation costs only
the time that is not hidden behind other work. Every cost is one of

    estimated  XLA's own cycles
    priced     ours, where XLA has no estimate: a kernel's roofline at KERNEL_EFFICIENCY,
               gathers, scatters and sorts by the bytes they touch at the chip's bandwidth,
               collectives by the links of their mesh axes (collectives.py)

and the two subtotals are always kept separate. Both are optimistic: a lower bound until calibrated.
"""

import collections
import dataclasses
import math
import re

from moe_jax.plan import collectives, hlo
from moe_jax.plan.collectives import Devices
from moe_jax.plan.hlo import Computation, Instruction, Module
from moe_jax.plan.topology import Topology

# Fraction of its roofline that a Pallas kernel reaches, unless measured: the figure for splash
# attention and grouped matrix products on large shapes.
KERNEL_EFFICIENCY = 0.6

PARTS = ("matmul", "attention", "dispatch", "collective", "optimizer", "head", "other")

# The innermost matching scope wins. The scopes are `jax.named_scope`s of the model and the step.
_SCOPES = {"attention": "attention", "route": "dispatch", "dispatch": "dispatch",
           "combine": "dispatch", "optimizer": "optimizer", "head": "head", "loss": "head"}
_FREE = frozenset(("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all",
                   "partition-id", "replica-id", "opt-barrier"))
_BY_BYTES = frozenset(("sort", "gather", "scatter", "fusion", "custom-call", "copy", "select",
                       "dynamic-slice", "dynamic-update-slice", "add", "multiply", "convert",
                       "reduce", "broadcast", "reshape", "transpose", "concatenate", "pad"))


@dataclasses.dataclass(frozen=True)
class Item:
  """The cost of one instruction, summed over its executions in a step on one device.

  Attributes:
    name: name of the instruction.
    op_name: the JAX scopes it came from.
    part: one of PARTS.
    times: executions per step.
    seconds: time per step during which the device can do nothing else.
    priced: whether the time is our estimate rather than XLA's.
    flops: FLOPs of its matrix products per step.
    collective: `all-gather`, ...; empty if it is not a collective.
    axes: mesh axes of a collective.
    bytes: bytes per step of a collective on one device.
    hidden_seconds: time of an asynchronous operation that is hidden behind other work.
  """

  name: str
  op_name: str
  part: str
  times: int
  seconds: float
  priced: bool
  flops: int = 0
  collective: str = ""
  axes: str = ""
  bytes: int = 0
  hidden_seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class Cost:
  """The items of a step."""

  items: tuple[Item, ...]
  clock_hz: float

  @property
  def seconds(self) -> float:
    """Estimated time of one step."""
    return sum(item.seconds for item in self.items)

  @property
  def estimated_seconds(self) -> float:
    """The part of `seconds` that XLA estimated."""
    return sum(item.seconds for item in self.items if not item.priced)

  @property
  def priced_seconds(self) -> float:
    """The part of `seconds` that this model priced."""
    return sum(item.seconds for item in self.items if item.priced)

  @property
  def estimated_cycles(self) -> float:
    return self.estimated_seconds * self.clock_hz

  @property
  def flops(self) -> int:
    """FLOPs of matrix products on one device, including recomputation and empty slots.

    The HLO does not show the inside of a Pallas kernel, so its declared FLOPs are used instead.
    """
    return sum(item.flops for item in self.items)

  def by_part(self) -> dict[str, float]:
    """Seconds of each part; every one of PARTS is a key."""
    seconds = dict.fromkeys(PARTS, 0.0)
    for item in self.items:
      seconds[item.part] += item.seconds
    return seconds

  def by_collective(self) -> dict[tuple[str, str], tuple[int, float, float]]:
    """(kind, axes) -> bytes on one device, seconds exposed, seconds hidden."""
    found = collections.defaultdict(lambda: (0, 0.0, 0.0))
    for item in self.items:
      if item.collective:
        n, exposed, hidden = found[item.collective, item.axes]
        found[item.collective, item.axes] = (n + item.bytes, exposed + item.seconds,
                                             hidden + item.hidden_seconds)
    return dict(found)


def estimate(module: Module, devices: Devices, topology: Topology,
             kernel_efficiency: float = KERNEL_EFFICIENCY) -> Cost:
  """Estimates the cost of a module by walking it from its entry.

  Raises:
    ValueError: the length of a loop is not in the HLO.
  """
  walk = _Walk(module, devices, topology, kernel_efficiency)
  walk.run(module.computations[module.entry], times=1)
  return Cost(tuple(walk.items), topology.hardware.clock_hz)


class _Clock:
  """Simulated time within a computation; asynchronous operations run in the background.

  Attributes:
    now: seconds since the computation began.
  """

  def __init__(self):
    self.now = 0.0
    self._free: dict[str, float] = collections.defaultdict(float)  # resource -> when it is free
    self._begun: dict[str, tuple[float, Item]] = {}  # key -> (finish time, item)

  def begin(self, key: str, item: Item, seconds: float, resource: str) -> None:
    """Queues an operation that keeps a resource busy for `seconds`."""
    self._free[resource] = max(self.now, self._free[resource]) + seconds
    self._begun[key] = self._free[resource], item

  def wait(self, key: str, times: int) -> list[Item]:
    """Waits for an operation; returns its item with its time split into exposed and hidden."""
    if key not in self._begun:
      return []
    finish, item = self._begun.pop(key)
    exposed = max(0.0, finish - self.now)
    self.now += exposed
    hidden = max(0.0, item.seconds - exposed * times)
    return [dataclasses.replace(item, seconds=exposed * times, hidden_seconds=hidden)]

  def wait_for_all(self, times: int) -> list[Item]:
    """Waits at the end for operations whose matching wait the walk did not see."""
    return [item for key in list(self._begun) for item in self.wait(key, times)]


class _Walk:
  """Walks the call graph in scheduled order, with a clock that tracks overlap."""

  def __init__(self, module: Module, devices: Devices, topology: Topology, efficiency: float):
    self.module, self.devices, self.topology = module, devices, topology
    self.efficiency = efficiency
    self.items: list[Item] = []

  def run(self, computation: Computation, times: int) -> float:
    """Adds the items of a computation that runs `times` times; returns the seconds of one run."""
    clock = _Clock()
    for instruction in computation.instructions:
      if instruction.opcode in _FREE:
        continue
      if instruction.opcode == "while":
        n = self.module.trip_count(instruction)
        body = self.module.computations[instruction.called("body")]
        clock.now += n * self.run(body, times * n)
      elif instruction.opcode == "call":
        clock.now += self.run(self.module.computations[instruction.called("to_apply")], times)
      elif instruction.opcode == "conditional":
        clock.now += self._dearest_branch(instruction, times)
      elif instruction.opcode == "send" and _rendezvous(instruction):
        item = self._between_slices(computation, instruction, times)
        clock.begin(_rendezvous(instruction), item, item.seconds / times, "network")
      elif fused := collectives.fused_transfer(self.module, instruction):
        # A collective in two fusions, which only start it and wait for it.
        if fused.starts:
          item = self._collective(fused.computation, fused.collective, times)
          clock.begin(fused.chain, item, item.seconds / times, "links")
        else:
          self.items += clock.wait(fused.chain, times)
      elif instruction.opcode.endswith("-start"):
        item, cost, resource = self._asynchronous(computation, instruction, times)
        clock.begin(instruction.name, item, cost, resource)
      elif instruction.opcode.endswith("-done"):
        awaited = instruction.operands[0]
        if instruction.opcode == "recv-done":
          awaited = _rendezvous(computation.by_name[awaited])
        self.items += clock.wait(awaited, times)
      else:
        item = self._synchronous(computation, instruction, times)
        self.items.append(item)
        clock.now += item.seconds / times
    self.items += clock.wait_for_all(times)
    return clock.now

  def _dearest_branch(self, instruction: Instruction, times: int) -> float:
    """Adds the items of the slowest branch, as the one taken is unknown; returns its seconds."""
    best, found = 0.0, []
    kept = self.items
    for name in instruction.branches:
      self.items = []
      took = self.run(self.module.computations[name], times)
      if took >= best:
        best, found = took, self.items
    self.items = kept + found
    return best

  def _asynchronous(self, computation, instruction, times) -> tuple[Item, float, str]:
    """Returns its item with the full cost, the seconds of one run, and the resource it uses."""
    if collectives.kind_of(instruction):
      item = self._collective(computation, instruction, times)
      return item, item.seconds / times, "links"
    if instruction.opcode in ("copy-start", "slice-start"):  # a prefetch between HBM and VMEM
      n_bytes = instruction.type[1].bytes  # what is copied; for a slice, type[0] is its operand
      cost = n_bytes / self.topology.hardware.device_hbm_bytes_per_second
      return self._item(instruction, times, cost, priced=True), cost, "copies"
    inside = instruction.called("to_apply") or instruction.called("calls")
    kept, self.items = self.items, []
    cost = self.run(self.module.computations[inside], times) if inside else 0.0
    inner, self.items = self.items, kept
    collective = next((item for item in inner if item.collective), None)
    item = self._item(instruction, times, cost, priced=all(i.priced for i in inner),
                      flops=sum(i.flops for i in inner))
    if collective:
      item = dataclasses.replace(item, part="collective", collective=collective.collective,
                                 axes=collective.axes, bytes=collective.bytes)
    return item, cost, "links" if collective else "cores"

  def _synchronous(self, computation, instruction, times) -> Item:
    if collectives.kind_of(instruction):
      return self._collective(computation, instruction, times)
    # XLA:TPU writes some reduce-scatters as a fusion of this name around an all-reduce.
    if (instruction.called("calls") or "").startswith("all-reduce-scatter"):
      reduce = next(inner for _, inner in self.module.nested(instruction)
                    if collectives.kind_of(inner) == "all-reduce")
      return self._collective(computation, instruction, times, "reduce-scatter",
                              reduce.attributes)
    flops = hlo.matmul_flops(computation, instruction) + sum(
        hlo.matmul_flops(where, inner) for where, inner in self.module.nested(instruction))
    cycles = instruction.estimated_cycles
    if cycles is not None:
      return self._item(instruction, times, cycles / self.topology.hardware.clock_hz,
                        priced=False, flops=flops)
    if 'custom_call_target="tpu_custom_call"' in instruction.attributes:
      return self._kernel(computation, instruction, times)
    cost = 0.0
    if instruction.opcode in _BY_BYTES:
      cost = self._touched_bytes(computation, instruction) / (
          self.topology.hardware.device_hbm_bytes_per_second)
    return self._item(instruction, times, cost, priced=True, flops=flops)

  def _kernel(self, computation, instruction, times) -> Item:
    """Prices a Pallas kernel by the roofline of the cost it declares, at the given efficiency."""
    declared = re.search(r'"cost_estimate":\{"flops":"?(\d+)"?.*?"bytes_accessed":"?(\d+)"?',
                         instruction.attributes, re.S)
    n_bytes = computation.operand_bytes(instruction) + sum(a.bytes for a in instruction.type)
    flops = int(declared[1]) if declared else splash_flops(computation, instruction)
    n_bytes = max(n_bytes, int(declared[2])) if declared else n_bytes
    chip = self.topology.hardware
    roofline = max(flops / chip.device_bf16_flops, n_bytes / chip.device_hbm_bytes_per_second)
    return self._item(instruction, times, roofline / self.efficiency, priced=True, flops=flops)

  def _touched_bytes(self, computation, instruction) -> int:
    """Bytes that an instruction reads and writes.

    A gather or slice touches only what it returns, a scatter or update only what it writes; other
    instructions read their operands whole.
    """
    result = sum(array.bytes for array in instruction.type)
    opcodes = {instruction.opcode} | {inner.opcode
                                      for _, inner in self.module.nested(instruction)}
    if opcodes & {"gather", "dynamic-slice", "slice"}:
      return 2 * result
    if opcodes & {"scatter", "dynamic-update-slice"}:
      operands = [array.bytes for name in instruction.operands
                  for array in computation.by_name[name].type]
      return 2 * (sum(operands) - max(operands, default=0))
    return result + computation.operand_bytes(instruction)

  def _collective(self, computation, instruction, times, kind="", attributes="") -> Item:
    """Prices a collective; `kind` and `attributes` override those of the instruction."""
    kind = kind or collectives.kind_of(instruction)
    n_bytes = collectives.moved_bytes(kind, computation, instruction)
    groups = collectives.groups_of(attributes or instruction.attributes, len(self.devices.slices))
    cost = collectives.seconds(kind, n_bytes, groups, self.devices, self.topology)
    item = self._item(instruction, times, cost, priced=True)
    axes = collectives.axes_of(groups, self.devices.axes)
    return dataclasses.replace(item, part="collective", collective=kind, axes=axes,
                               bytes=n_bytes * times)

  def _between_slices(self, computation, send: Instruction, times) -> Item:
    """Prices a host transfer over the data-center network, which completes at a `recv-done`."""
    kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', send.attributes)
    kind = kind[1].lower().replace("_", "-") if kind else "send"
    n_bytes = computation.operand(send, 0).bytes
    moved = (2 if kind == "all-reduce" else 1) * n_bytes * (1 - 1 / self.topology.n_slices)
    item = self._item(send, times, moved / self.topology.hardware.device_dcn_bytes_per_second,
                      priced=True)
    return dataclasses.replace(item, part="collective", collective=kind, axes="data",
                               bytes=n_bytes * times)

  def _item(self, instruction: Instruction, times: int, seconds: float, priced: bool,
            flops: int = 0) -> Item:
    op_name = instruction.op_name
    if flops and instruction.opcode == "fusion":  # name it after its product, not its root
      for where, inner in self.module.nested(instruction):
        if hlo.matmul_flops(where, inner):
          op_name = inner.op_name or op_name
    return Item(instruction.name, op_name, part_of(op_name, bool(flops)), times,
                seconds * times, priced, flops * times)


def _rendezvous(transfer: Instruction) -> str:
  """The rendezvous key shared by both sides of a host transfer; empty for other instructions."""
  found = re.search(r'_xla_host_transfer_rendezvous="([^"]*)"', transfer.attributes)
  return found[1] if found else ""


# Matrix products of [S, h] with [h, S] or equivalent size in each pass of splash attention.
_SPLASH_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}


def splash_flops(computation: Computation, kernel: Instruction) -> int:
  """FLOPs of splash attention, which does not declare them; 0 for any other kernel.

  Of its n x n tiles it computes the n (n + 1) / 2 that the causal mask does not fully mask.
  """
  found = re.match(r"splash_m[hq]a_(fwd|dq|dkv)_", kernel.name)
  if not found:
    return 0
  operands = [computation.by_name[name].type[0] for name in kernel.operands]
  tiles = next(array.dims[-1] for array in operands if array.dtype == "s8")  # the tile mask
  *rows, seq_len, h = next(array.dims for array in operands if array.dtype in ("bf16", "f32"))
  scores = math.prod(rows) * seq_len**2 * (tiles + 1) // (2 * tiles)
  return 2 * _SPLASH_PRODUCTS[found[1]] * scores * h


def part_of(op_name: str, is_matmul: bool) -> str:
  """Returns the part of the step that an instruction belongs to, from its innermost known scope."""
  for scope in reversed(re.split(r"[/()]+", op_name)):
    if scope in _SCOPES:
      return _SCOPES[scope]
  return "matmul" if is_matmul else "other"
