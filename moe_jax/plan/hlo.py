"""Parses the text of a compiled HLO module: computations, instructions, shapes, FLOPs.

The format is that of `jax.stages.Compiled.as_text()`: a scheduled module, so the instructions of a
computation are in the order in which the core runs them.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32,
         "u32": 32, "s64": 64, "u64": 64, "f16": 16, "bf16": 16, "f32": 32, "f64": 64,
         "c64": 64, "c128": 128}
_FLOAT8 = re.compile(r"f8\w+$")
_ARRAY = re.compile(r"([a-z]\w*)\[([0-9,]*)\](\{[^{}]*\})?")
_HEADER = re.compile(r"^(?:ENTRY )?%(\S+) \(.*\{$")
_INSTRUCTION = re.compile(r"^  (ROOT )?%(\S+) = ")
_OPCODE = re.compile(r"([a-z][a-z0-9-]*)\(")
_NAME = re.compile(r"%([^\s,(){}]+)")
_NO_ESTIMATE = 2**63 - 1  # printed by libtpu where it has no estimate


@dataclasses.dataclass(frozen=True)
class Array:
  """Element type and dimensions of one array; `space` 0 is the device's main memory."""

  dtype: str
  dims: tuple[int, ...]
  space: int = 0

  @property
  def size(self) -> int:
    return math.prod(self.dims)

  @property
  def bytes(self) -> int:
    bits = 8 if _FLOAT8.match(self.dtype) else _BITS.get(self.dtype, 0)  # token[] has no size
    return -(-self.size * bits // 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One instruction.

  Attributes:
    name: unique in its computation.
    opcode: as printed, e.g. `fusion`, `all-gather-start`.
    type: the arrays of its result, tuples flattened.
    operands: names of instructions of the same computation.
    attributes: the text after the operands.
    literal: the text in the parentheses of a constant or a parameter.
    is_root: whether its result is the computation's.
  """

  name: str
  opcode: str
  type: tuple[Array, ...]
  operands: tuple[str, ...]
  attributes: str
  literal: str
  is_root: bool

  @property
  def op_name(self) -> str:
    """The JAX scopes and primitive it came from; empty if XLA introduced it."""
    found = re.search(r'op_name="([^"]*)"', self.attributes)
    return found[1] if found else ""

  @property
  def estimated_cycles(self) -> int | None:
    """XLA's own estimate for one execution; None if it has none."""
    found = re.search(r'"estimated_cycles":"(\d+)"', self.attributes)
    cycles = int(found[1]) if found else _NO_ESTIMATE
    return None if cycles >= _NO_ESTIMATE else cycles

  def called(self, kind: str) -> str | None:
    """The computation named by `calls=`, `body=`, `condition=` or `to_apply=`."""
    found = re.search(rf"\b{kind}=%([^\s,}}]+)", self.attributes)
    return found[1] if found else None

  @property
  def branches(self) -> tuple[str, ...]:
    """The computations between which a conditional chooses, by a number or by a boolean."""
    indexed = re.search(r"branch_computations=\{([^}]*)\}", self.attributes)
    return tuple(re.findall(r"%([^\s,]+)", indexed[1]) if indexed else
                 re.findall(r"(?:true|false)_computation=%([^\s,]+)", self.attributes))


@dataclasses.dataclass(frozen=True)
class Computation:
  """Instructions in scheduled order."""

  name: str
  instructions: tuple[Instruction, ...]

  @functools.cached_property
  def by_name(self) -> dict[str, Instruction]:
    return {instruction.name: instruction for instruction in self.instructions}

  @property
  def root(self) -> Instruction:
    return next(i for i in self.instructions if i.is_root)

  def operand(self, instruction: Instruction, index: int) -> Array:
    """The (first) array of an operand."""
    return self.by_name[instruction.operands[index]].type[0]

  def operand_bytes(self, instruction: Instruction) -> int:
    return sum(array.bytes for name in instruction.operands
               for array in self.by_name[name].type)


@dataclasses.dataclass(frozen=True)
class Module:
  computations: dict[str, Computation]
  entry: str
  sources: dict[int, str] = dataclasses.field(default_factory=dict)  # stack frame -> file:line

  def source(self, instruction: Instruction) -> str:
    """`file:line` that an instruction came from; empty if XLA does not record it."""
    found = re.search(r"stack_frame_id=(\d+)", instruction.attributes)
    return self.sources.get(int(found[1]), "") if found else ""

  def trip_count(self, loop: Instruction) -> int:
    """Number of iterations of a `while` loop.

    Either XLA annotates it (`known_trip_count`), or the condition compares a counter that starts
    at 0 with a constant, which is what `lax.scan` and `fori_loop` compile to. If the length depends
    on data, the model may put the loop under a scope `trips_N`, N being its average trip count.

    Raises:
      ValueError: none of these applies.
    """
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
    if known:
      return int(known[1])
    condition = self.computations[loop.called("condition")]
    bound = self._compared_constant(condition, condition.root)
    expected = re.findall(r"trips_(\d+)", loop.op_name)
    if bound is None and expected:
      return int(expected[-1])
    if bound is None:
      raise ValueError(f"the length of the loop %{loop.name} is not in the HLO: its condition "
                       f"%{condition.name} does not compare with a constant")
    return bound

  def _compared_constant(self, computation: Computation, root: Instruction) -> int | None:
    """The bound of `counter < constant`, looking through a fusion if there is one, else None."""
    if root.opcode == "fusion":
      inner = self.computations[root.called("calls")]
      outside = {i.literal: computation.by_name[root.operands[int(i.literal)]]
                 for i in inner.instructions if i.opcode == "parameter"}
      compare, resolve = inner.root, inner.by_name
    else:
      outside, compare, resolve = {}, root, computation.by_name
    if compare.opcode != "compare" or "direction=L" not in compare.attributes:
      return None
    for name in compare.operands:
      value = resolve[name]
      if value.opcode == "parameter":
        value = outside.get(value.literal, value)
      if value.opcode == "constant" and value.type[0].dtype[0] in "su":  # counters are integers
        return int(value.literal) + ("direction=LE" in compare.attributes)
    return None

  def nested(self, instruction: Instruction) -> Iterator[tuple[Computation, Instruction]]:
    """Yields the instructions of a fusion, including those of nested fusions."""
    inside = instruction.called("calls") if instruction.opcode == "fusion" else None
    if inside is None:
      return
    computation = self.computations[inside]
    for inner in computation.instructions:
      yield computation, inner
      yield from self.nested(inner)


def parse(text: str) -> Module:
  """Parses a module's text."""
  computations, entry = {}, None
  name, lines = None, []
  for line in text.splitlines():
    header = _HEADER.match(line)
    if name is None and header:
      name = header[1]
      if line.startswith("ENTRY"):
        entry = name
    elif name is not None and line.startswith("}") and not line.startswith("}}"):
      computations[name] = Computation(name, tuple(map(_instruction, _joined(lines))))
      name, lines = None, []
    elif name is not None:
      lines.append(line)
  if entry is None:
    raise ValueError("the text has no ENTRY computation: not the HLO of a compiled module")
  return Module(computations, entry, _sources(text))


def _sources(text: str) -> dict[int, str]:
  """Stack frame -> `file:line`, from the tables before the first computation."""
  tables = text[:text.find("\n%")]
  files = dict(re.findall(r'^(\d+) "([^"]*\.py)"$', tables.partition("FunctionNames")[0], re.M))
  lines = {number: f"{files.get(file, '?')}:{line}" for number, file, line in re.findall(
      r"^(\d+) \{file_name_id=(\d+) .*?\bline=(\d+)", tables, re.M)}
  return {int(frame): lines[location] for frame, location in re.findall(
      r"^(\d+) \{file_location_id=(\d+)", tables, re.M) if location in lines}


def _joined(lines: list[str]) -> list[str]:
  """Joins lines into one string per instruction: a Pallas kernel's config spans lines."""
  whole = []
  for line in lines:
    if _INSTRUCTION.match(line) or not whole:
      whole.append(line)
    else:
      whole[-1] += "\n" + line
  return whole


def _instruction(line: str) -> Instruction:
  start = _INSTRUCTION.match(line)
  rest = line[start.end():]
  end_of_type = _closing(rest) + 1 if rest.startswith("(") else rest.index(" ")
  type_text, rest = rest[:end_of_type], rest[end_of_type:].lstrip()
  opcode = _OPCODE.match(rest)
  end = opcode.end() - 1 + _closing(rest[opcode.end() - 1:])
  inside = rest[opcode.end():end]
  arrays = tuple(Array(dtype, tuple(int(n) for n in dims.split(",") if n), _space(layout))
                 for dtype, dims, layout in _ARRAY.findall(re.sub(r"/\*.*?\*/", "", type_text)))
  return Instruction(start[2], opcode[1], arrays, tuple(_NAME.findall(inside)), rest[end + 1:],
                     inside.strip() if "%" not in inside else "", start[1] is not None)


def _space(layout: str) -> int:
  found = re.search(r"S\((\d+)\)", layout)
  return int(found[1]) if found else 0


def _closing(text: str) -> int:
  """Index of the parenthesis that closes the one at 0."""
  depth = 0
  for match in re.finditer(r"[()]", text):
    depth += 1 if match[0] == "(" else -1
    if depth == 0:
      return match.start()
  raise ValueError(f"unbalanced parentheses in {text[:80]!r}")


def matmul_flops(computation: Computation, instruction: Instruction) -> int:
  """FLOPs of a `dot` or `convolution`, 2 per multiply-add actually performed; else 0."""
  if instruction.opcode == "dot":
    return _dot_flops(computation, instruction)
  if instruction.opcode == "convolution":
    return _convolution_flops(computation, instruction)
  return 0


def _dot_flops(computation: Computation, dot: Instruction) -> int:
  left = computation.operand(dot, 0)
  axes = re.search(r"lhs_contracting_dims=\{([0-9,]*)\}", dot.attributes)
  contracted = math.prod(left.dims[int(axis)] for axis in axes[1].split(",") if axis)
  return 2 * dot.type[0].size * contracted


def _convolution_flops(computation: Computation, conv: Instruction) -> int:
  """FLOPs of a convolution, which is how TPUs express matrix products.

  Batch dimensions become dilated spatial ones. Multiplications by padding or by the holes of a
  dilation are not counted.
  """
  left, right = computation.operand(conv, 0), computation.operand(conv, 1)
  labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", conv.attributes)
  lhs, rhs, out = labels[1], labels[2], labels[3]
  output = conv.type[0]
  flops = (2 * output.dims[out.index("b")] * output.dims[out.index("f")]
           * right.dims[rhs.index("i")])
  window = _window(conv.attributes)
  for axis in (label for label in lhs if label.isdigit()):
    i = int(axis)
    flops *= _valid_pairs(left.dims[lhs.index(axis)], output.dims[out.index(axis)],
                          **{key: values[i] for key, values in window.items()
                             if i < len(values)})
  return flops


def _window(attributes: str) -> dict[str, list]:
  """{size, stride, pad, lhs_dilate, rhs_dilate} of a convolution, one value per dimension."""
  found = re.search(r"window=\{([^}]*)\}", attributes)
  window = {}
  for item in found[1].split() if found else ():
    key, _, values = item.partition("=")
    if key == "pad":
      window[key] = [int(pair.split("_")[0]) for pair in values.split("x")]
    elif key in ("size", "stride", "lhs_dilate", "rhs_dilate"):
      window[key] = [int(value) for value in values.split("x")]
  return window


@functools.lru_cache(maxsize=4096)
def _valid_pairs(n_in: int, n_out: int, size: int = 1, stride: int = 1, pad: int = 0,
                 lhs_dilate: int = 1, rhs_dilate: int = 1) -> int:
  """Number of (output, kernel) position pairs that fall on an element of the input."""
  span = (n_in - 1) * lhs_dilate + 1
  count = 0
  for kernel in range(size):
    offset = kernel * rhs_dilate - pad
    low = max(0, -(offset // stride))  # the first output with position >= 0
    high = min(n_out - 1, (span - 1 - offset) // stride)
    if high < low:
      continue
    if lhs_dilate == 1:
      count += high - low + 1
    else:
      count += sum((out * stride + offset) % lhs_dilate == 0 for out in range(low, high + 1))
  return count
