"""Finds the largest live buffers at the peak memory of a compiled step.

XLA's TPU compiler reports totals, and the buffers behind them only for an attached device. So this
replays the schedule: a buffer lives from the instruction that creates it to the last one that reads
it. It ignores padding and XLA's tighter packing, so the sum is close but not equal to XLA's total.
"""

import dataclasses
import re
from collections.abc import Sequence

from moe_jax.plan.hlo import Array, Computation, Instruction, Module

_VIEWS = frozenset(("bitcast", "tuple", "get-tuple-element", "opt-barrier", "after-all"))
_NOTHING = frozenset(("constant", "iota", "partition-id", "replica-id"))
_IN_PLACE = frozenset(("dynamic-update-slice", "scatter"))


@dataclasses.dataclass(frozen=True)
class Buffer:
  """One array in the device's memory.

  Attributes:
    bytes: size without padding of the layout.
    shape: e.g. `bf16[8,2048,1024]`.
    op_name: the JAX scopes and primitive that made it.
    source: `file:line`; empty if XLA does not record it.
  """

  bytes: int
  shape: str
  op_name: str
  source: str


def live_at_peak(module: Module) -> list[Buffer]:
  """Returns the buffers alive at peak memory, largest first."""
  walk = _Walk(module)
  entry = module.computations[module.entry]
  peak = walk.run(entry, None)
  return sorted((walk.buffers[number] for number in peak), key=lambda buffer: -buffer.bytes)


class _Walk:
  """Walks computations in scheduled order; a value is the buffer numbers of its leaves."""

  def __init__(self, module: Module):
    self.module = module
    self.buffers: list[Buffer] = []

  def run(self, computation: Computation, given: Sequence[int] | None) -> frozenset[int]:
    """Returns the buffers alive at a computation's peak that it or what it calls creates.

    Args:
      computation: the computation to walk.
      given: the buffers of its parameter's leaves, owned by the caller; None for the entry, which
        owns its parameters.
    """
    values, own, inner = {}, set(), {}
    for instruction in computation.instructions:
      values[instruction.name] = self._value(instruction, values, given, own)
      inner[instruction.name] = self._called(instruction, values)
    last = {}
    for index, instruction in enumerate(computation.instructions):
      for name in (*instruction.operands, instruction.name):
        last.update(dict.fromkeys(values.get(name, ()), index))
    always = {number for instruction in computation.instructions
              if instruction.opcode == "parameter" or instruction.is_root
              for number in values[instruction.name] if given is None or instruction.is_root}
    alive, peak, most = set(), frozenset(), -1
    for index, instruction in enumerate(computation.instructions):
      alive |= {number for number in values[instruction.name] if number in own}
      now = frozenset(alive | inner[instruction.name])
      size = sum(self.buffers[number].bytes for number in now)
      if size > most:
        peak, most = now, size
      alive -= {number for number in alive if last[number] <= index and number not in always}
    return peak

  def _value(self, instruction: Instruction, values, given, own) -> tuple[int, ...]:
    operands = [number for name in instruction.operands for number in values.get(name, ())]
    opcode = instruction.opcode
    if opcode == "parameter" and given is not None:
      return tuple(given)
    if opcode in _NOTHING:
      return ()
    if opcode == "get-tuple-element" and len(operands) > 1:
      index = re.search(r"index=(\d+)", instruction.attributes)
      whole = values[instruction.operands[0]]
      return (whole[int(index[1])],) if int(index[1]) < len(whole) else tuple(whole)
    if opcode in _VIEWS or opcode == "while" or opcode.endswith("-done"):
      return tuple(operands)
    spare = list(operands) if self._in_place(instruction) or opcode.endswith("-start") else []
    leaves = []
    for array in instruction.type:
      same = next((n for n in spare if self.buffers[n].shape == _shape(array)), None)
      if same is not None:
        spare.remove(same)
        leaves.append(same)
      elif array.space == 0:
        leaves.append(self._new(array, instruction))
        own.add(leaves[-1])
    return tuple(leaves)

  def _in_place(self, instruction: Instruction) -> bool:
    """Whether the result may reuse the buffer of an operand."""
    return instruction.opcode in _IN_PLACE or any(
        inner.opcode in _IN_PLACE for _, inner in self.module.nested(instruction))

  def _called(self, instruction: Instruction, values) -> frozenset[int]:
    """The buffers that a loop, call or branch creates and holds at its peak."""
    runs = []
    if instruction.opcode == "while":
      runs = [(instruction.called("body"), values[instruction.name])]
    elif instruction.opcode == "call":
      runs = [(instruction.called("to_apply"), [
          number for name in instruction.operands for number in values.get(name, ())])]
    elif instruction.opcode == "conditional":  # its first operand chooses
      runs = [(name, values.get(operand, ())) for name, operand in zip(
          instruction.branches, instruction.operands[1:], strict=True)]
    peaks = [self.run(self.module.computations[name], given) for name, given in runs]
    return max(peaks, default=frozenset(), key=lambda peak: sum(
        self.buffers[number].bytes for number in peak))

  def _new(self, array: Array, instruction: Instruction) -> int:
    self.buffers.append(Buffer(array.bytes, _shape(array), instruction.op_name,
                               self.module.source(instruction)))
    return len(self.buffers) - 1


def _shape(array: Array) -> str:
  return f"{array.dtype}[{','.join(map(str, array.dims))}]"
