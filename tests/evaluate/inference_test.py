"""The measured cost of inference: what is counted is right, what is timed is there."""

import dataclasses

import jax
import numpy as np
import pytest

from moe_jax.arch import count
from moe_jax.errors import FieldError
from moe_jax.evaluate import cost, inference
from moe_jax.evaluate.decode import Decoder
from moe_jax.evaluate.generate import generate
from moe_jax.mesh import make_mesh
from moe_jax.model import functional
from tests.evaluate.conftest import cells_of
from tests.small import ARCH, small_config

CONFIG = small_config()
MACHINE = inference.Machine(1e9, inference.roofline.Slice(
    dataclasses.replace(inference.roofline.HARDWARE["v5e"], hbm_bytes_per_second=1e9), 1))


def test_bytes_of_a_step_are_every_weight_once_all_experts_are_touched():
  cache = count.kv_cache_bytes(ARCH, 10_000, 16, "float32")
  table = 4 * ARCH.vocab_size * ARCH.d_model  # rows of the embedding are looked up, not read
  assert inference.decode_bytes(CONFIG, 10_000, 16) == pytest.approx(
      count.weight_bytes(ARCH, "float32") - table + cache)
  one = inference.decode_bytes(CONFIG, 1, 16) - count.kv_cache_bytes(ARCH, 1, 16, "float32")
  assert one == pytest.approx(4 * count.n_active(ARCH) + table)


@pytest.mark.slow
def test_each_batch_size_is_measured_beside_its_bounds():
  mesh = make_mesh(CONFIG, jax.devices()[:1])
  decoder = Decoder(CONFIG, mesh, functional.init_params(CONFIG, mesh))
  tokens_N = np.random.default_rng(0).integers(0, 256, 100)
  found = inference.measure(decoder, tokens_N, (1, 2), MACHINE)
  assert [each["batch"] for each in found["measured"]] == [1, 2]
  assert found["weight_bytes"] == count.weight_bytes(ARCH, "float32")
  assert found["cache_bytes_per_sequence"] == count.kv_cache_bytes(ARCH, 1, 16, "float32")
  for each in found["measured"]:
    assert each["decode_ms"] > 0 and each["prefill_tokens_per_second"] > 0
    assert each["decode_limit_ms"] == pytest.approx(
        1e-6 * inference.decode_bytes(CONFIG, each["batch"], 16))
    assert each["decode_bandwidth_fraction"] == pytest.approx(
        each["decode_limit_ms"] / each["decode_ms"])
    # design counts a bfloat16 cache, and the same weights
    assert 0.5 < each["decode_roofline_ms"] / each["decode_limit_ms"] <= 1.001
  row = found["columns"] | {"cell": "a", "loss": 2.0, "loss_se": None}
  assert cost.batch_sizes(row) == [1, 2] and row["decode_ms_b2"] > 0
  assert cost.figure([row]) is not None and cost.figure([row, row | {"cell": "b"}]) is not None
  assert cost.table({"a": found}).row_count == 2
  with pytest.raises(FieldError, match="is longer than the 10 tokens"):
    inference.measure(decoder, tokens_N[:10], (1,), MACHINE)


def test_the_machine_is_looked_at():
  machine = inference.look_at(jax.devices())
  assert 1e8 < machine.bytes_per_second < 1e13 and machine.slice.n_chips == 1


@pytest.mark.parametrize("text", ["", "0", "1,x", "1.5"])
def test_what_is_no_batch_size_is_refused(text):
  with pytest.raises(FieldError, match="must be numbers of sequences"):
    cost.parse_batch_sizes(text)
  assert cost.parse_batch_sizes("8,1") == (1, 8)


@pytest.mark.parametrize("sections, prompt, message", [
    ({}, "", "is an empty prompt"), ({}, "Hello", "holds no run: train it first"),
    ({"moe": {"router": "expert_choice", "norm_topk_prob": False}}, "Hello", "cannot decode")])
def test_what_cannot_be_continued_is_refused_before_anything_is_read(out, sections, prompt,
                                                                     message):
  (cell,) = cells_of(seeds=1, **sections)
  with pytest.raises(FieldError, match=message) as error:
    generate(cell, out, [prompt], 4, None)
  assert "\n" not in str(error.value)
