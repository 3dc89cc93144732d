import numpy as np
import pytest

from moe_jax.plan import cost, hlo, topology
from moe_jax.plan.collectives import Devices
from tests.plan import executed
from tests.plan.hlo_test import fixture

V5E = topology.parse("v5litepod-8")
EIGHT = Devices({"data": 2, "expert": 4},
                np.stack(np.unravel_index(np.arange(8), (2, 4)), axis=1), np.zeros(8, int))
CLOCK = V5E.hardware.clock_hz


@pytest.fixture(scope="module")
def scan():
  return cost.estimate(fixture("scan.v5litepod-8"), EIGHT, V5E)


def test_the_body_of_a_loop_counts_as_often_as_it_runs(scan):
  assert scan.flops == 3 * 2 * 512**3
  (exchange,) = [item for item in scan.items if item.collective == "all-to-all"]
  assert (exchange.times, exchange.axes) == (3, "expert")
  assert exchange.bytes == 3 * 4 * 128 * 512 * 2


@pytest.mark.parametrize("name", executed.STEPS)
def test_flops_of_a_step_are_those_that_are_counted(name):
  """Dense without recomputation; MoE with it, where half of the slots are empty."""
  config = executed.STEPS[name]
  found = cost.estimate(fixture(f"{name}.v5litepod-8"), EIGHT, V5E).flops
  assert found == pytest.approx(executed.executed_flops(config, 8), rel=0.01)


def gathers(name, axes):
  devices = Devices(axes, EIGHT.coordinates, EIGHT.slices)
  found = cost.estimate(fixture(f"{name}.v5litepod-8"), devices, V5E).by_collective()
  return {key: n_bytes for key, (n_bytes, *_) in found.items() if key[0] == "all-gather"}


def test_every_gather_of_weights_is_found_however_it_is_written():
  """Most are in two fusions each. In bfloat16; with full remat those of a layer come twice."""
  arch = executed.STEPS["dense-none"].arch
  d, ends = arch.d_model, 2 * 2 * arch.d_model * arch.vocab_size  # embedding and head
  attention, router = 2 * 4 * d * d, 4 * d * arch.n_exp
  assert gathers("dense-none", {"data": 2, "fsdp": 4}) == {
      ("all-gather", "fsdp"): ends + 2 * (attention + 2 * 3 * d * arch.dense_width)}
  assert gathers("moe-full", {"data": 2, "expert": 4}) == {
      ("all-gather", "expert"): ends + 2 * 2 * (attention + router)}


def test_estimated_and_priced_are_apart(scan):
  assert scan.seconds == pytest.approx(scan.estimated_seconds + scan.priced_seconds)
  assert scan.estimated_seconds > 0 and scan.priced_seconds > 0
  assert sum(scan.by_part().values()) == pytest.approx(scan.seconds)
  assert all(item.priced for item in scan.items if item.collective)


def test_collectives_by_kind_and_axis(scan):
  found = scan.by_collective()
  assert set(found) == {("all-to-all", "expert"), ("all-reduce", "data+expert"),
                        ("all-gather", "data+expert")}
  assert found["all-gather", "data+expert"][0] == 4096 * 512 * 2


def module(body: str, computations: str = "") -> hlo.Module:
  return hlo.parse(f"""HloModule m

{computations}ENTRY %main (a: f32[1000000]) -> f32[1000000] {{
  %a = f32[1000000]{{0}} parameter(0)
{body}
}}
""")


def busy(name: str, cycles: int) -> str:
  return (f'  %{name} = f32[1000000]{{0}} negate(%a), backend_config='
          f'{{"estimated_cycles":"{cycles}"}}')


GATHER = ('  %s = (f32[1000000]{0}, f32[8000000]{0}) all-gather-start(%a), '
          "replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}")
DONE = "  ROOT %d = f32[8000000]{0} all-gather-done(%s)"


def gather_seconds() -> float:
  link = V5E.hardware.link_bytes_per_second / 4
  return 32e6 * 7 / 8 / (2 * link)


@pytest.mark.parametrize("share", [0.0, 0.5, 3.0])
def test_only_what_is_not_hidden_costs(share):
  cycles = round(share * gather_seconds() * CLOCK)
  between = "\n".join([GATHER, busy("w", cycles), DONE])
  found = cost.estimate(module(between), EIGHT, V5E)
  exposed = max(0.0, gather_seconds() - cycles / CLOCK)
  (item,) = [item for item in found.items if item.collective]
  assert item.seconds == pytest.approx(exposed, abs=1e-12)
  assert item.hidden_seconds == pytest.approx(gather_seconds() - exposed)
  assert found.seconds == pytest.approx(max(gather_seconds(), cycles / CLOCK))


def test_what_is_never_awaited_is_awaited_at_the_end():
  found = cost.estimate(module("\n".join([GATHER, busy("w", 100).replace("  %w", "  ROOT %w")])),
                        EIGHT, V5E)
  assert found.seconds == pytest.approx(gather_seconds())
  (item,) = [item for item in found.items if item.collective]
  assert item.hidden_seconds == pytest.approx(100 / CLOCK)


@pytest.mark.parametrize("share", [0.0, 0.5, 3.0])
def test_a_collective_begun_in_one_fusion_and_awaited_in_another(share):
  """As XLA:TPU writes those that it overlaps: both ends hold the collective, with one chain_id."""
  gather = ("%g{0} = f32[8000000]{{0}} all-gather(%p{0}), replica_groups={{{{0,1,2,3,4,5,6,7}}}}, "
            'dimensions={{0}}, frontend_attributes={{chain_id="{1}"}}')
  ends = "".join(f"""%end.{end}{chain} (p: f32[1000000]) -> f32[8000000] {{
  %p{end}{chain} = f32[1000000]{{0}} parameter(0)
  {gather.format(f"{end}{chain}", chain)}
  ROOT %c{end}{chain} = f32[8000000]{{0}} custom-call(%g{end}{chain}), \
custom_call_target="AsyncCollective{end}"
}}

""" for chain in (1, 2) for end in ("Start", "Done"))

  def fusion(name, of, operand):
    return f"  {name} = f32[8000000]{{0}} fusion({operand}), kind=kCustom, calls=%end.{of}"

  cycles = round(share * gather_seconds() * CLOCK)
  text = "\n".join([fusion("%s1", "Start1", "%a"), fusion("%s2", "Start2", "%a"),
                    busy("w", cycles), fusion("%d1", "Done1", "%s1"),
                    fusion("ROOT %d2", "Done2", "%s2")])
  found = cost.estimate(module(text, ends), EIGHT, V5E)
  first, second = [item for item in found.items if item.collective]
  assert (first.collective, first.axes, first.bytes) == ("all-gather", "data+expert", 32_000_000)
  exposed = max(0.0, gather_seconds() - cycles / CLOCK)
  assert first.seconds == pytest.approx(exposed, abs=1e-12)
  assert first.seconds + first.hidden_seconds == pytest.approx(gather_seconds())
  assert found.seconds == pytest.approx(max(2 * gather_seconds(), cycles / CLOCK))
  assert {item.part for item in found.items} == {"collective", "other"}  # other: what is busy


@pytest.mark.parametrize("start", [
    "%s = (f32[1000000]{0:S(1)}, f32[1000000]{0}, u32[]) copy-start(%a)",
    "%s = ((f32[8000000]{0}), f32[1000000]{0:S(1)}, s32[]) slice-start(%b), slice={[0:1000000]}"])
def test_a_prefetch_takes_the_time_of_what_it_copies(start):
  kind = start.partition("-start")[0].rpartition(" ")[2]
  text = "\n".join(["  %b = f32[8000000]{0} parameter(1)", "  " + start,
                    f"  ROOT %d = f32[1000000]{{0}} {kind}-done(%s)"])
  found = cost.estimate(module(text), EIGHT, V5E)
  assert found.seconds == pytest.approx(4e6 / V5E.hardware.device_hbm_bytes_per_second)


def test_two_transfers_share_the_links():
  second = GATHER.replace("%s ", "%s2 ")
  text = "\n".join([GATHER, second, DONE.replace("ROOT %d", "%d"),
                    "  ROOT %d2 = f32[8000000]{0} all-gather-done(%s2)"])
  assert cost.estimate(module(text), EIGHT, V5E).seconds == pytest.approx(2 * gather_seconds())


def test_a_fusion_that_scatters_what_it_reduces_is_a_collective():
  """As XLA:TPU writes it: an all-reduce, and each device's slice of it, in one fusion."""
  reduced = """%all-reduce-scatter.1 (p: f32[8000000]) -> f32[1000000] {
  %p = f32[8000000]{0} parameter(0)
  %r = f32[8000000]{0} all-reduce(%p), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  ROOT %s = f32[1000000]{0} dynamic-slice(%r, %p), dynamic_slice_sizes={1000000}
}

"""
  whole = module("""  %w = f32[8000000]{0} parameter(1)
  ROOT %f = f32[1000000]{0} fusion(%w), kind=kCustom, calls=%all-reduce-scatter.1""", reduced)
  (item,) = cost.estimate(whole, EIGHT, V5E).items
  assert (item.collective, item.axes, item.bytes) == ("reduce-scatter", "data+expert", 32_000_000)
  assert item.part == "collective"
  assert item.seconds == pytest.approx(gather_seconds())


def test_a_kernel_is_priced_by_what_it_declares():
  kernel = ('  ROOT %k = f32[1000000]{0} custom-call(%a), custom_call_target="tpu_custom_call", '
            'backend_config={"custom_call_config":{"cost_estimate":{"flops":"197000000000",'
            '"transcendentals":"0","bytes_accessed":"1000"}}}')
  found = cost.estimate(module(kernel), EIGHT, V5E)
  assert found.flops == 197_000_000_000
  assert found.seconds == pytest.approx(1e-3 / cost.KERNEL_EFFICIENCY)
  assert found.priced_seconds == found.seconds
  assert cost.estimate(module(kernel), EIGHT, V5E, kernel_efficiency=1.0).seconds == (
      pytest.approx(1e-3))


@pytest.mark.parametrize("phase, products", [("fwd", 2), ("dq", 3), ("dkv", 4)])
def test_splash_attention_is_priced_by_the_tiles_under_the_diagonal(phase, products):
  array = "bf16[2,8,2048,128]{3,2,1,0}"
  text = f"""  %m = s8[1,4,4]{{2,1,0}} parameter(1)
  %q = {array} parameter(2)
  ROOT %splash_mha_{phase}_segmented.1 = {array} custom-call(%m, %q, %q, %q), \
custom_call_target="tpu_custom_call\""""
  found = cost.estimate(module(text), EIGHT, V5E)
  tiles, tile = 4 * 5 // 2, 512
  assert found.flops == products * 2 * 2 * 8 * tiles * tile**2 * 128
  assert found.priced_seconds == pytest.approx(found.flops / 197e12 / cost.KERNEL_EFFICIENCY)


def test_a_gather_reads_what_it_returns():
  text = "  ROOT %g = f32[1000]{0} gather(%a, %a), offset_dims={1}"
  assert cost.estimate(module(text), EIGHT, V5E).seconds == pytest.approx(2 * 4000 / 820e9)


@pytest.mark.parametrize("branches", [
    "branch_computations={%dear, %cheap}",
    "true_computation=%cheap, false_computation=%dear",
])
def test_the_dearest_branch_counts(branches):
  text = f"""HloModule m

%cheap (a: f32[10]) -> f32[10] {{
  %a = f32[10]{{0}} parameter(0)
{busy("w", 5).replace("1000000", "10").replace("  %w", "  ROOT %w")}
}}

%dear (a: f32[10]) -> f32[10] {{
  %a = f32[10]{{0}} parameter(0)
{busy("w", 700).replace("1000000", "10").replace("  %w", "  ROOT %w")}
}}

ENTRY %main (a: f32[10], p: pred[]) -> f32[10] {{
  %a = f32[10]{{0}} parameter(0)
  %p = pred[] parameter(1)
  ROOT %c = f32[10]{{0}} conditional(%p, %a, %a), {branches}
}}
"""
  assert cost.estimate(hlo.parse(text), EIGHT, V5E).estimated_cycles == pytest.approx(700)


@pytest.mark.parametrize("op_name, is_matmul, part", [
    ("jit(step)/jvp()/while/body/closed_call/attention/vmap()/sub", False, "attention"),
    ("jit(step)/transpose(jvp(loss))/mul", False, "head"),
    ("jit(step)/optimizer/mul", False, "optimizer"),
    ("jit(step)/jvp()/dot_general", True, "matmul"),
    ("", False, "other"),
])
def test_parts(op_name, is_matmul, part):
  assert cost.part_of(op_name, is_matmul) == part


def test_what_crosses_slices_is_sent_by_the_host_and_waited_for_where_it_is_received():
  """Megascale's all-reduce: 1 MB each way of 4 MB between two slices, behind half of its time."""
  two = topology.parse("v5litepod-8", 2)
  whole = 4e6 / two.hardware.dcn_bytes_per_second
  names = ('frontend_attributes={_xla_host_transfer_rendezvous="sum_0",'
           '_xla_megascale_transfer_type="ALL_REDUCE"}')
  body = "\n".join([
      "  %t = token[] after-all()",
      f"  %s = (f32[1000000]{{0}}, u32[], token[]) send(%a, %t), channel_id=2, {names}",
      f"  %r = (f32[1000000]{{0}}, u32[], token[]) recv(%t), channel_id=1, {names}",
      busy("w", round(whole / 2 * CLOCK)),
      "  %sd = token[] send-done(%s), channel_id=2",
      "  ROOT %rd = (f32[1000000]{0}, token[]) recv-done(%r), channel_id=1"])
  found = cost.estimate(module(body), EIGHT, two)
  n_bytes, exposed, hidden = found.by_collective()["all-reduce", "data"]
  assert n_bytes == 4_000_000
  assert exposed == pytest.approx(whole / 2) and hidden == pytest.approx(whole / 2)
  assert found.seconds == pytest.approx(whole)
