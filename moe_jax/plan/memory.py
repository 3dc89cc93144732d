"""The largest buffers that are alive when a compiled step needs most memory.

XLA's TPU compiler gives totals, and which buffers they are made of only for a device that is
there. So this replays the schedule: a buffer lives from the instruction that makes it to the
last that reads it. What XLA packs more cleverly than that (and what it pads) is not seen: the
sum is near its own total and not equal to it.
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
    bytes: without what the layout pads.
    shape: e.g. `bf16[8,2048,1024]`.
    op_name: the JAX scopes and primitive that made it.
    source: `file:line`, where XLA says it.
  """

  bytes: int
  shape: str
  op_name: str
  source: str


def live_at_peak(module: Module) -> list[Buffer]:
  """What is alive at the moment when most bytes are, largest first."""
  walk = _Walk(module)
  entry = module.computations[module.entry]
  peak = walk.run(entry, None)
  return sorted((walk.buffers[number] for number in peak), key=lambda buffer: -buffer.bytes)


class _Walk:
  """Goes through computations in scheduled order; a value is the buffers of its leaves."""

  def __init__(self, module: Module):
    self.module = module
    self.buffers: list[Buffer] = []

  def run(self, computation: Computation, given: Sequence[int] | None) -> frozenset[int]:
    """The buffers that the computation itself makes and that are alive at its peak.

    Args:
      computation: what runs.
      given: the buffers of its parameter's leaves, which belong to the caller; None for the
        entry, whose parameters are its own.
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
    """Whether its result takes the place of an operand."""
    return instruction.opcode in _IN_PLACE or any(
        inner.opcode in _IN_PLACE for _, inner in self.module.nested(instruction))

  def _called(self, instruction: Instruction, values) -> frozenset[int]:
    """What a loop or a branch holds while it runs, beside what it is given."""
    given = values[instruction.name] if instruction.opcode == "while" else [
        number for name in instruction.operands for number in values.get(name, ())]
    names = []
    if instruction.opcode == "while":
      names = [instruction.called("body")]
    elif instruction.opcode == "call":
      names = [instruction.called("to_apply")]
    elif instruction.opcode == "conditional":
      branches = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
      names = re.findall(r"%([^\s,]+)", branches[1]) if branches else []
    peaks = [self.run(self.module.computations[name], given) for name in names]
    return max(peaks, default=frozenset(), key=lambda peak: sum(
        self.buffers[number].bytes for number in peak))

  def _new(self, array: Array, instruction: Instruction) -> int:
    self.buffers.append(Buffer(array.bytes, _shape(array), instruction.op_name,
                               self.module.source(instruction)))
    return len(self.buffers) - 1


def _shape(array: Array) -> str:
  return f"{array.dtype}[{','.join(map(str, array.dims))}]"
