"""What is alive when, on schedules whose answer is known."""

import pytest

from moe_jax.plan import hlo, memory
from tests.plan.hlo_test import fixture

MIB = 2**20
ONE, TWO = "f32[262144]{0}", "f32[524288]{0}"  # 1 and 2 MiB


def peak(body: str, before: str = "") -> list[tuple[str, int]]:
  text = f"""HloModule m

{before}
ENTRY %main (a: f32[262144]) -> f32[262144] {{
  %a = {ONE} parameter(0), metadata={{op_name="a"}}
{body}
}}
"""
  return [(buffer.op_name, buffer.bytes // MIB) for buffer in
          memory.live_at_peak(hlo.parse(text))]


def op(name: str, shape: str, opcode: str, *operands: str, more: str = "", root: bool = False):
  inside = ", ".join(f"%{operand}" for operand in operands)
  return (f'  {"ROOT " * root}%{name} = {shape} {opcode}({inside}){more}, '
          f'metadata={{op_name="{name}"}}')


def test_a_buffer_lives_until_its_last_reader():
  found = peak("\n".join([
      op("big", TWO, "broadcast", "a"), op("b", ONE, "slice", "big"),
      op("c", ONE, "negate", "b"), op("d", ONE, "add", "c", "a", root=True)]))
  assert found == [("big", 2), ("a", 1), ("b", 1)]  # neither c nor d is there yet


def test_views_and_updates_in_place_take_nothing():
  found = peak("\n".join([
      op("big", TWO, "broadcast", "a"), op("view", TWO, "bitcast", "big"),
      op("i", "s32[]", "constant"),
      op("put", TWO, "dynamic-update-slice", "view", "a", "i"),
      op("d", ONE, "slice", "put", root=True)]))
  assert sorted(found) == [("a", 1), ("big", 2), ("d", 1)]


def test_what_is_on_the_chip_is_not_in_its_main_memory():
  near = "f32[524288]{0:T(1024)S(1)}"
  found = peak("\n".join([op("near", near, "broadcast", "a"),
                          op("d", ONE, "slice", "near", root=True)]))
  assert sorted(found) == [("a", 1), ("d", 1)]


def test_a_loop_holds_its_own_once_and_what_it_is_given():
  loop = f"""%body (p: (s32[], {ONE})) -> (s32[], {ONE}) {{
  %p = (s32[], {ONE}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = {ONE} get-tuple-element(%p), index=1
  %wide = {TWO} broadcast(%x), metadata={{op_name="wide"}}
  %y = {ONE} slice(%wide), metadata={{op_name="y"}}
  ROOT %t = (s32[], {ONE}) tuple(%i, %y)
}}

%condition (p: (s32[], {ONE})) -> pred[] {{
  %p = (s32[], {ONE}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] constant(9)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}}
"""
  found = peak("\n".join([
      op("zero", "s32[]", "constant"), op("start", ONE, "negate", "a"),
      op("t", f"(s32[], {ONE})", "tuple", "zero", "start"),
      op("w", f"(s32[], {ONE})", "while", "t", more=", condition=%condition, body=%body"),
      op("d", ONE, "get-tuple-element", "w", more=", index=1", root=True)]), loop)
  assert found[0] == ("wide", 2) and ("start", 1) in found and ("a", 1) in found
  assert len([name for name, _ in found if name == "wide"]) == 1


@pytest.mark.parametrize("branches", [
    "branch_computations={%wide, %narrow}",
    "true_computation=%narrow, false_computation=%wide",
])
def test_a_conditional_holds_its_largest_branch(branches):
  inside = "".join(f"""%{name} (x: {ONE}) -> {ONE} {{
  %x = {ONE} parameter(0)
  %own = {size} broadcast(%x), metadata={{op_name="{name}"}}
  ROOT %y = {ONE} slice(%own), metadata={{op_name="y"}}
}}

""" for name, size in (("wide", TWO), ("narrow", ONE)))
  found = peak("\n".join([
      op("p", "pred[]", "constant"),
      op("c", ONE, "conditional", "p", "a", "a", more=f", {branches}", root=True)]), inside)
  assert found[0] == ("wide", 2) and "narrow" not in dict(found)


def test_each_branch_gets_its_own_operand():
  """An update in place of what a branch is given creates nothing."""
  inside = "".join(f"""%{name} (t: (s32[], {size})) -> {ONE} {{
  %t = (s32[], {size}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %x = {size} get-tuple-element(%t), index=1
  %put = {size} dynamic-update-slice(%x, %x, %i), metadata={{op_name="put"}}
  ROOT %y = {ONE} slice(%put), metadata={{op_name="y"}}
}}

""" for name, size in (("first", ONE), ("second", TWO)))
  found = peak("\n".join([
      op("p", "pred[]", "constant"), op("zero", "s32[]", "constant"),
      op("big", TWO, "broadcast", "a"), op("s", f"(s32[], {ONE})", "tuple", "zero", "a"),
      op("t", f"(s32[], {TWO})", "tuple", "zero", "big"),
      op("c", ONE, "conditional", "p", "s", "t",
         more=", true_computation=%first, false_computation=%second", root=True)]), inside)
  assert "put" not in dict(found) and ("big", 2) in found


def test_sources_are_read_from_the_tables():
  text = """HloModule m

FileNames
1 "/x/moe_jax/model/attention.py"

FunctionNames
1 "f"

FileLocations
1 {file_name_id=1 function_name_id=1 line=63 end_line=63 column=1 end_column=2}

StackFrames
1 {file_location_id=1 parent_frame_id=1}

ENTRY %main (a: f32[262144]) -> f32[262144] {
  %a = f32[262144]{0} parameter(0)
  ROOT %b = f32[262144]{0} negate(%a), metadata={op_name="b" stack_frame_id=1}
}
"""
  sources = {buffer.op_name: buffer.source for buffer in memory.live_at_peak(hlo.parse(text))}
  assert sources == {"": "", "b": "/x/moe_jax/model/attention.py:63"}


def test_a_real_module_has_a_peak():
  found = memory.live_at_peak(fixture("scan.v5litepod-8"))
  assert found == sorted(found, key=lambda buffer: -buffer.bytes) and found[0].bytes > 0
