import json

import pytest

from tests.experiment_files import run_module

SHAPE = "--attention_rows=2", "--attention_seq_len=16", "--attention_heads=2", "--attention_width=8"


def test_each_way_is_near_the_exact_one_and_timed():
  done = run_module("-m", "benchmarks.attention", *SHAPE, "--attention_passes=1", XLA_FLAGS="")
  assert done.returncode == 0, done.stderr
  table, _, figures = done.stdout.partition("\n{")
  found = json.loads("{" + figures)
  assert "2 x 16 tokens, 2 heads of 8" in table and list(found["ways"]) == ["plain", "ours"]
  for name, way in found["ways"].items():
    assert f" {name} " in table and 0 < way["error"] < 2**-6
    assert way["forward_ms"] > 0 and way["gradients_ms"] > 0
    # Two products of scores forward and five backward, half of each: 7 B H S^2 h.
    assert way["of_the_product"] == pytest.approx(
        7 * 2 * 2 * 16**2 * 8 / (way["gradients_ms"] / 1e3) / found["product_flops"])


@pytest.mark.parametrize("name, way", [
    ("wrong", "lambda q, k, v, s: 1.1 * plain_attention(q, k, v, s, mesh)"),
    ("refused", "lambda q, k, v, s: jax.nn.dot_product_attention(q, k, v[..., 1:])"),
    ("dead", "lambda q, k, v, s: 1 / 0"),
])
def test_a_way_that_is_wrong_or_refused_shows(name, way):
  """Its row says why, and the others are timed."""
  code = f"""
import functools, jax
from benchmarks import attention
from moe_jax.model.attend import plain_attention
attention.ways = lambda mesh: {{{name!r}: {way},
                               "plain": functools.partial(plain_attention, mesh=mesh)}}
from moe_jax import cli
cli.run(attention.main)
"""
  done = run_module("-c", code, *SHAPE, "--attention_passes=1", XLA_FLAGS="")
  assert done.returncode == 0, done.stderr
  found = json.loads("{" + done.stdout.partition("\n{")[2])["ways"]
  assert found["plain"]["error"] < 2**-6
  if name == "wrong":
    assert found["wrong"]["error"] == pytest.approx(0.1, rel=0.1)
  else:
    assert list(found[name]) == ["refused"] and found[name]["refused"]
