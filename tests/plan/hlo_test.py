import gzip
import pathlib

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.moe.grouped_matmul import grouped_matmul
from moe_jax.plan import hlo

FIXTURES = pathlib.Path(__file__).parent / "fixtures"


def fixture(name: str) -> hlo.Module:
  with gzip.open(FIXTURES / f"{name}.hlo.gz", "rt") as file:
    return hlo.parse(file.read())


@pytest.fixture(scope="module")
def scan():
  return fixture("scan.v5litepod-8")


def loops(module):
  return [i for c in module.computations.values() for i in c.instructions
          if i.opcode == "while"]


def flops(module: hlo.Module) -> int:
  """Of every product, each once."""
  return sum(hlo.matmul_flops(c, i) for c in module.computations.values()
             for i in c.instructions)


def test_a_loop_of_a_tpu_module_knows_its_length(scan):
  (loop,) = loops(scan)
  assert scan.trip_count(loop) == 3


def test_shapes_and_operands(scan):
  body = scan.computations[loops(scan)[0].called("body")]
  (exchange,) = [i for i in body.instructions if i.opcode == "all-to-all"]
  assert exchange.type == (hlo.Array("bf16", (4, 128, 512), space=1),)  # S(1), on the chip
  assert body.operand(exchange, 0).bytes == 4 * 128 * 512 * 2
  assert "shard_map/all_to_all" in exchange.op_name
  assert exchange.estimated_cycles is None


def test_the_product_is_counted_in_the_fusion_that_holds_it(scan):
  body = scan.computations[loops(scan)[0].called("body")]
  inside = sum(hlo.matmul_flops(where, inner) for i in body.instructions
               for where, inner in scan.nested(i))
  assert inside == 2 * 512 * 512 * 512  # a chip's 512 rows of 4096
  fusion = next(i for i in body.instructions if list(scan.nested(i)))
  assert fusion.estimated_cycles > 0


def compiled(f, *arrays) -> hlo.Module:
  return hlo.parse(jax.jit(f).lower(*arrays).compile().as_text())


def test_trip_counts_of_fresh_modules():
  def f(x):
    def inner(carry, _):
      return carry @ carry, None
    def outer(carry, _):
      return jax.lax.scan(inner, carry, length=3)[0], None
    return jax.lax.scan(outer, x, length=5)[0]

  module = compiled(f, jnp.ones((16, 16)))
  assert sorted(module.trip_count(loop) for loop in loops(module)) == [3, 5]


def test_a_loop_that_depends_on_data_is_refused():
  def f(x):
    return jax.lax.while_loop(lambda x: x.sum() < 10, lambda x: x * 2, x)

  module = compiled(f, jnp.ones((4,)))
  with pytest.raises(ValueError, match="does not compare with a constant"):
    module.trip_count(loops(module)[0])


def test_a_loop_over_blocks_says_how_long_it_usually_is():
  """512 of 900 rows are in use, two blocks of 256, and one block more is begun by two experts."""
  def f(x_SD, w_EDF, size_E):
    return grouped_matmul(x_SD, w_EDF, size_E, "gpu", usual_rows=512)

  module = compiled(f, jnp.ones((900, 8)), jnp.ones((2, 8, 4)), jnp.array([400, 112]))
  assert [module.trip_count(loop) for loop in loops(module)] == [3]


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 4), *(3 * [st.integers(10, 40)]))  # of tiny ones XLA makes loops
def test_flops_of_a_batched_product(b, m, k, n):
  module = compiled(lambda x, y: jnp.einsum("bmk,bkn->bmn", x, y),
                    jnp.ones((b, m, k)), jnp.ones((b, k, n)))
  assert flops(module) == 2 * b * m * k * n
  assert flops(compiled(jnp.dot, jnp.ones((64, 32)), jnp.ones((32, 48)))) == 2 * 64 * 32 * 48


# As XLA:TPU writes products (the shapes are of a real module). Batch dimensions are spatial ones
# with holes, sums over two dimensions are windows.
@pytest.mark.parametrize("output, left, right, attributes, expected", [
    ("bf16[8,2048,8,128]", "bf16[8,2048,1024,1]", "bf16[1024,8,128,1]",
     "window={size=1x8 pad=0_0x7_7 rhs_reversal=0x1}, dim_labels=0bf1_i1o0->0b1f",
     2 * 8 * 2048 * 1024 * 8 * 128),
    ("f32[8,8,2048,2048]", "bf16[8,2048,8,128]", "bf16[8,2048,8,128]",
     "window={size=8x8 stride=7x7 lhs_dilate=8x8}, dim_labels=0b1f_0o1i->01bf",
     2 * 8 * 8 * 2048 * 2048 * 128),
    ("bf16[8,2048,1024,1]", "bf16[8,2048,8,128]", "bf16[1,8,128,1024]",
     "window={size=1x8}, dim_labels=0b1f_01io->0bf1", 2 * 8 * 2048 * 1024 * 8 * 128),
    ("f32[16384,64]", "f32[16384,1024]", "f32[1024,64]", "dim_labels=bf_io->bf",
     2 * 16384 * 64 * 1024),
])
def test_flops_of_tpu_convolutions(output, left, right, attributes, expected):
  text = f"""HloModule m

ENTRY %main (a: {left}, b: {right}) -> {output} {{
  %a = {left}{{0}} parameter(0)
  %b = {right}{{0}} parameter(1)
  ROOT %c = {output}{{0}} convolution(%a, %b), {attributes}
}}
"""
  assert flops(hlo.parse(text)) == expected


def test_text_that_is_no_module_is_refused():
  with pytest.raises(ValueError, match="no ENTRY"):
    hlo.parse("not HLO")


def test_an_absent_estimate_and_a_kernel_over_several_lines():
  text = """HloModule m

ENTRY %main (a: f32[8]) -> (f32[8], s4[3]) {
  %a = f32[8]{0} parameter(0)
  %k = f32[8]{0} custom-call(%a), custom_call_target="tpu_custom_call", backend_config={"x": {
}}, "more": "lines", "estimated_cycles":"9223372036854775807"}
  %n = s4[3]{0:T(128)} constant({1, 2, 3})
  ROOT %t = (f32[8]{0}, /*index=1*/s4[3]{0}) tuple(%k, %n)
}
"""
  main = hlo.parse(text).computations["main"]
  assert [i.name for i in main.instructions] == ["a", "k", "n", "t"]
  assert main.by_name["k"].estimated_cycles is None
  assert [array.bytes for array in main.root.type] == [32, 2]
  assert main.root.operands == ("k", "n")
