"""A paired comparison: the interval holds the truth, and hard documents fall out."""

import math

import numpy as np
import pytest
from etils import epath

from moe_jax.errors import FieldError
from moe_jax.evaluate import compare
from moe_jax.evaluate.heldout import Documents
from moe_jax.run_dir import RunDir

RNG = np.random.default_rng(0)


def documents(gap=0.0, n=40, noise=0.01, seed=0):
  """Losses of two runs: documents differ by much, the runs by `gap` nats a token."""
  rng = np.random.default_rng(seed)
  targets_D = rng.integers(50, 400, n)
  hard_D = rng.normal(3, 0.5, n)
  common = {"targets_D": targets_D, "bytes_D": targets_D * 3, "domain_D": np.arange(n) % 2,
            "fingerprint": np.array("x")}
  a, b = ({"nats_D": (hard_D + shift + rng.normal(0, noise, n)) * targets_D} | common
          for shift in (0, gap))
  return a, b


def test_what_is_hard_for_both_falls_out():
  found = compare.difference(*documents(gap=0.02))
  assert found.unit == "nats per token" and found.documents == 40
  assert found.low < -0.02 < found.high < 0 and found.better > 30
  assert found.se < found.alone / 10


def test_the_interval_covers_as_often_as_it_says():
  held = [found.low < -0.02 < found.high for found in
          (compare.difference(*documents(0.02, 12, seed=seed)) for seed in range(400))]
  assert 0.91 < np.mean(held) < 0.98


def test_other_tokens_of_the_same_text_compare_by_bytes():
  a, b = documents()
  b = b | {"targets_D": b["targets_D"] * 2, "fingerprint": np.array("y")}
  assert compare.same_documents(a, b)
  found = compare.difference(a, b)
  assert found.unit == "bits per byte"
  expected = (a["nats_D"] - b["nats_D"]).sum() / a["bytes_D"].sum() / math.log(2)
  assert found.value == pytest.approx(expected)
  assert not compare.same_documents(a, documents(seed=5)[0])


def test_one_document_has_no_interval_and_the_report_says_what_is_shown():
  one = compare.difference(*documents(n=1))
  assert one.low is None
  assert "interval" not in compare.report("a", "b", "heldout", one, {})[1]
  a, b = documents(gap=0.02)
  lines = compare.report("a", "b", "heldout", compare.difference(a, b), {
      "text": compare.difference(a, b, a["domain_D"] == 0),
      "code": compare.difference(a, b, a["domain_D"] == 1)})
  assert len(lines) == 5 and "a is better" in lines[1] and "20" in lines[2]
  none = compare.report("a", "b", "heldout", compare.difference(*documents()), {})
  assert "no difference shown" in none[1]


def test_documents_belong_to_a_checkpoint(tmp_path):
  run_dir = RunDir(epath.Path(tmp_path))
  result = {"step": 4, "checkpoint": "abc", "data_fingerprint": "x"}
  arrays = Documents(*RNG.random((5, 3)))
  compare.write_documents(run_dir, "heldout", result, arrays)
  found = compare.read_documents(run_dir, "heldout", result)
  np.testing.assert_array_equal(found["nats_D"], arrays.nats_D)
  assert compare.read_documents(run_dir, "heldout", result | {"checkpoint": "other"}) is None
  assert compare.read_documents(run_dir, "train", result) is None
  run_dir.documents("heldout").write_bytes(b"PK damaged")
  assert compare.read_documents(run_dir, "heldout", result) is None



@pytest.mark.parametrize("text, message", [
    ("a", "must be two different cells"), ("a,a", "must be two different"),
    ("a,c", "no such cell")])
def test_what_is_no_pair_is_refused(text, message):
  with pytest.raises(FieldError, match=message):
    compare.parse_pair(text, ["a", "b"])
  assert compare.parse_pair("a, b", ["a", "b"]) == ("a", "b")
