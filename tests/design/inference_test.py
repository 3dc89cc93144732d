import math

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from benchmarks.design_search import scalar_decode_ms
from moe_jax.arch import HARDWARE, count
from moe_jax.design.inference import (
    Serving,
    decode_ms,
    memory_gb,
    parse_dtype,
    parse_slice,
    prefill_ms,
    touched_experts,
)
from moe_jax.design.published import PUBLISHED
from moe_jax.design.space import VARIABLES, Space
from moe_jax.errors import FieldError
from moe_jax.laws.shape import Shape

OLMOE = PUBLISHED["OLMoE-1B-7B"].arch


def test_touched_experts_are_those_of_a_simulation():
  rng = np.random.default_rng(0)
  for n_exp, n_topk, n_tokens in ((64, 8, 1), (64, 8, 10), (16, 3, 40), (8, 8, 2)):
    drawn = np.argsort(rng.random((4000, n_tokens, n_exp)), axis=-1)[..., :n_topk]
    distinct = [len(np.unique(one)) for one in drawn]
    assert touched_experts(n_exp, n_topk, n_tokens) == pytest.approx(
        np.mean(distinct), abs=4 * np.std(distinct) / 4000**0.5 + 1e-9)
  assert touched_experts(256, 8, 1) == pytest.approx(8)
  assert touched_experts(256, 8, 10**6) == pytest.approx(256)


def test_one_sequence_reads_the_active_weights_and_its_cache():
  serving = Serving(batch=1, context=1000, slice=parse_slice("v5e-1"))
  moved = (2 * (count.n_active(OLMOE) + OLMOE.vocab_size * OLMOE.d_model)
           + count.kv_cache_bytes(OLMOE, 1, 1000, "bfloat16"))
  assert decode_ms(Shape.of(OLMOE), serving) == pytest.approx(1e3 * moved / 820e9)


def test_a_large_batch_reads_every_expert_and_is_bound_by_arithmetic():
  serving = Serving(batch=10**5, context=1, slice=parse_slice("v5e-1"))
  flops = 10**5 * count.decode_flops_per_token(OLMOE, 1)
  # All but the cache, of which a context of one has as many bytes as it has FLOPs.
  assert decode_ms(Shape.of(OLMOE), serving) == pytest.approx(1e3 * flops / 197e12, rel=0.05)


def test_a_prompt_is_bound_by_arithmetic():
  serving = Serving(context=8192, slice=parse_slice("v5p-1"))
  flops = 8192 * count.prefill_flops_per_token(OLMOE, 8192)
  assert prefill_ms(Shape.of(OLMOE), serving) == pytest.approx(1e3 * flops / 459e12, rel=0.02)


def test_weights_of_one_byte_take_half_the_time_and_memory():
  shape = Shape.of(OLMOE)
  wide, narrow = (Serving(dtype, context=1, slice=parse_slice("h100"))
                  for dtype in ("bfloat16", "float8"))
  assert decode_ms(shape, wide) == pytest.approx(2 * decode_ms(shape, narrow), rel=0.001)
  assert memory_gb(shape, wide) == pytest.approx(2 * memory_gb(shape, narrow), rel=0.001)
  assert memory_gb(shape, wide) == pytest.approx(13.84, abs=0.01)  # 6.92e9 parameters


def test_chips_share_the_work_and_add_all_reduces():
  one, eight = (Serving(batch=64, slice=parse_slice(f"v5e-{n}")) for n in (1, 8))
  sent = 2 * OLMOE.n_layers * 2 * 7 / 8 * 64 * OLMOE.d_model * 2
  assert decode_ms(Shape.of(OLMOE), eight) == pytest.approx(
      decode_ms(Shape.of(OLMOE), one) / 8 + 1e3 * sent / 200e9)


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(st.sampled_from(list(PUBLISHED.values())), st.integers(1, 300),
                  st.sampled_from([1, 500, 30_000]), st.sampled_from(["v5e-8", "h200", "v4-64"]),
                  st.sampled_from(["bfloat16", "int8"]))
def test_one_architecture_in_plain_python_takes_the_same_time(model, batch, context, name, dtype):
  serving = Serving(dtype, batch, context, parse_slice(name))
  assert decode_ms(Shape.of(model.arch), serving) == pytest.approx(
      scalar_decode_ms(model.arch, serving), rel=1e-12)


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(st.integers(0, 2**32 - 1), st.sampled_from(VARIABLES), st.integers(1, 256))
def test_every_cost_grows_with_what_the_search_relies_on(seed, name, batch):
  """The search does not try more experts, or more of them a token, on what is too dear."""
  rng = np.random.default_rng(seed)
  five = dict(n_layers=rng.integers(4, 50), d_model=128 * rng.integers(1, 40),
              d_expert=128 * rng.integers(1, 40), n_exp=2**rng.integers(4, 10),
              n_topk=rng.integers(1, 7))
  space, serving = Space(), Serving(batch=batch, context=512, slice=parse_slice("v6e-4"))
  small, large = (space.shape(*(five | {name: five[name] * times}).values()) for times in (1, 2))
  for cost in (memory_gb, decode_ms, prefill_ms):
    assert cost(large, serving) >= cost(small, serving) * (1 - 1e-12)
  assert large.n_active >= small.n_active


def test_slices():
  found = parse_slice("V5e-8")
  assert found.chip is HARDWARE["v5e"] and found.n_chips == 8 and str(found) == "v5e-8"
  assert found.usable_gb == pytest.approx(0.9 * 8 * 16 * 2**30 / 1e9)
  assert str(parse_slice("a100-80")) == "a100-80-1" and parse_slice("a100-80-4").n_chips == 4
  assert math.isclose(parse_slice("h100").usable_gb, 72)


@pytest.mark.parametrize("ask, line", [
    (lambda: parse_slice("v5f-8"), "hardware='v5f-8': must be CHIP-CHIPS such as v5e-8; did you"),
    (lambda: parse_slice("v5e-0"), "hardware='v5e-0': must be"),
    (lambda: parse_slice("v5e-x"), "hardware='v5e-x': must be"),
    (lambda: parse_dtype("bf17"), "dtype='bf17': did you mean"),
    (lambda: Serving(batch=0), "batch=0: must be at least 1"),
    (lambda: Serving(context=0), "context=0: must be at least 1"),
    (lambda: decode_ms(Shape.of(OLMOE), Serving()), "hardware=None: is missing"),
])
def test_bad_input(ask, line):
  with pytest.raises(FieldError) as error:
    ask()
  assert str(error.value).startswith(line)
