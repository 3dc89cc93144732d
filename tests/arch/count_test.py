import dataclasses
import math

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from moe_jax.arch import Architecture, count
from moe_jax.errors import FieldError

OLMOE = Architecture(n_layers=16, d_model=2048, d_expert=1024, n_exp=64, n_topk=8, n_heads=16,
                     vocab_size=50304)
QWEN3_30B = Architecture(n_layers=48, d_model=2048, d_expert=768, n_exp=128, n_topk=8,
                         n_heads=32, n_kv_heads=4, head_dim=128, vocab_size=151936)


@st.composite
def architectures(draw, most_dense_layers=3):
  kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
  n_heads = kv_heads * group
  n_exp, n_dense = draw(st.integers(1, 9)), draw(st.integers(0, most_dense_layers))
  return Architecture(
      n_layers=n_dense + draw(st.integers(1, 4)),
      d_model=2 * n_heads * draw(st.integers(1, 20)),
      d_expert=draw(st.integers(1, 50)),
      n_exp=n_exp,
      n_topk=draw(st.integers(1, n_exp)),
      n_heads=n_heads,
      n_kv_heads=draw(st.sampled_from([None, kv_heads])),
      head_dim=draw(st.sampled_from([None, 2, 16])),
      vocab_size=draw(st.integers(1, 300)),
      n_shared_experts=draw(st.integers(0, 2)),
      n_dense_layers=n_dense,
      d_dense=draw(st.sampled_from([None, 1, 77])),
      tie_embeddings=draw(st.booleans()),
      qk_norm=draw(st.sampled_from(["head", "projection", "none"])))


def tree(arch, n_routed=None):
  """Every tensor of the model, one by one: (name, shape)."""
  n_routed = arch.n_exp if n_routed is None else n_routed
  d, h, f = arch.d_model, arch.d_head, arch.d_expert
  tensors = [("embed", (arch.vocab_size, d)), ("final_norm", (d,))]
  if not arch.tie_embeddings:
    tensors.append(("head", (d, arch.vocab_size)))
  for layer in range(arch.n_layers):
    normed = {"head": (1, 1), "projection": (arch.n_heads, arch.kv_heads),
              "none": (0, 0)}[arch.qk_norm]
    tensors += [("attention_norm", (d,)), ("ffn_norm", (d,)), ("q_norm", (normed[0] * h,)),
                ("k_norm", (normed[1] * h,)), ("q", (d, arch.n_heads, h)),
                ("k", (d, arch.kv_heads, h)), ("v", (d, arch.kv_heads, h)),
                ("o", (arch.n_heads, h, d))]
    if layer < arch.n_dense_layers:
      width = arch.d_dense or (arch.n_topk + arch.n_shared_experts) * f
      tensors += [("gate", (d, width)), ("up", (d, width)), ("down", (width, d))]
      continue
    tensors.append(("router", (d, arch.n_exp)))
    for _ in range(n_routed):
      tensors += [("gate", (d, f)), ("up", (d, f)), ("down", (f, d))]
    if arch.n_shared_experts:
      width = arch.n_shared_experts * f
      tensors += [("gate", (d, width)), ("up", (d, width)), ("down", (width, d))]
  return tensors


def size(tensors, without=("embed", "head")):
  return sum(math.prod(shape) for name, shape in tensors if name not in without)


@hypothesis.settings(max_examples=200, deadline=None)
@hypothesis.given(architectures())
def test_counts_are_those_of_the_tree(arch):
  assert count.n_total(arch) == size(tree(arch))
  assert count.n_active(arch) == size(tree(arch, arch.n_topk))
  assert count.n_total_with_embedding(arch) == size(tree(arch), without=())
  assert count.n_active_with_embedding(arch) == size(tree(arch, arch.n_topk), without=())


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(architectures(), st.integers(1, 40))
def test_forward_flops_are_those_of_every_product_of_a_sequence(arch, seq_len):
  matrices = [math.prod(shape) for name, shape in tree(arch, arch.n_topk)
              if len(shape) > 1 and name not in ("embed", "head")]
  head = arch.d_model * arch.vocab_size  # a tied head multiplies all the same
  flops = seq_len * 2 * (sum(matrices) + head)
  for position in range(seq_len):
    keys = position + 1
    scores_and_values = 2 * (2 * keys * arch.d_head) * arch.n_heads
    flops += arch.n_layers * scores_and_values
  assert count.forward_flops_per_token(arch, seq_len) * seq_len == flops
  assert count.training_flops_per_token(arch, seq_len) * seq_len == 3 * flops
  prefill = count.prefill_flops_per_token(arch, seq_len) * seq_len
  assert prefill == pytest.approx(flops - (seq_len - 1) * 2 * head)
  # Prefill and one more token are the forward pass over the longer sequence, the head of
  # all but two positions left out.
  longer = count.forward_flops_per_token(arch, seq_len + 1) * (seq_len + 1)
  step = count.decode_flops_per_token(arch, seq_len + 1)
  assert prefill + step == pytest.approx(longer - (seq_len - 1) * 2 * head)


def test_hand_computed():
  arch = Architecture(n_layers=2, d_model=8, d_expert=4, n_exp=3, n_topk=2, n_heads=2,
                      n_kv_heads=1, vocab_size=10)
  attention = 8 * 8 + 8 * 4 + 8 * 4 + 8 * 8  # q, k, v, o
  layer = attention + 2 * 4 + 2 * 8 + 8 * 3  # head norms, layer norms, router
  assert count.n_total(arch) == 8 + 2 * (layer + 3 * 96) == 1064
  assert count.n_active(arch) == 8 + 2 * (layer + 2 * 96) == 872
  assert count.n_total_with_embedding(arch) == 1064 + 160
  # 2 * (projections, router, two experts) a layer; head; 1.5 keys * 4 * 8 a layer.
  assert count.forward_flops_per_token(arch, 2) == 2 * 2 * (192 + 24 + 192) + 160 + 2 * 48
  assert count.decode_flops_per_token(arch, 5) == 2 * 2 * (192 + 24 + 192) + 160 + 2 * 160
  assert count.weight_bytes(arch, "bfloat16") == 2 * 1224
  assert count.optimizer_bytes(arch) == 8 * 1224
  assert count.kv_cache_bytes(arch, batch=3, context=7, dtype="bfloat16") == (
      2 * 2 * 4 * 3 * 7 * 2)


def test_published_sizes():
  assert round(count.n_total_with_embedding(OLMOE) / 1e9, 1) == 6.9
  assert round(count.n_active_with_embedding(OLMOE) / 1e9, 1) == 1.3
  assert round(count.n_total_with_embedding(QWEN3_30B) / 1e9, 1) == 30.5
  # Published as 3.3 billion: cut, not rounded, for the tree makes it 3.353.
  assert math.floor(count.n_active_with_embedding(QWEN3_30B) / 1e8) / 10 == 3.3
  assert round(count.n_total(QWEN3_30B) / 1e9, 1) == 29.9  # "non-embedding", its model card


@hypothesis.given(architectures(most_dense_layers=0))
@hypothesis.settings(max_examples=100, deadline=None)
def test_paper_leaves_out_router_norms_and_nothing_else(arch):
  arch = dataclasses.replace(arch, n_kv_heads=None, head_dim=None, n_shared_experts=0)
  formula = arch.n_layers * arch.d_model**2 * (4 + 3 * arch.n_exp / arch.granularity)
  assert count.paper_n_total(arch) == pytest.approx(formula)
  formula = arch.n_layers * arch.d_model**2 * (4 + 3 * arch.n_topk / arch.granularity)
  assert count.paper_n_active(arch) == pytest.approx(formula)
  left_out = arch.d_model + arch.n_layers * (
      2 * arch.d_model + arch.qk_norm_scales + arch.d_model * arch.n_exp)
  assert count.n_total(arch) - count.paper_n_total(arch) == left_out
  assert count.n_active(arch) - count.paper_n_active(arch) == left_out


def test_counts_are_whole_numbers():
  for value in (count.n_total(OLMOE), count.forward_flops_per_token(OLMOE, 4096),
                count.paper_n_total(OLMOE), count.weight_bytes(OLMOE, "float32")):
    assert type(value) is int


@pytest.mark.parametrize("call, message", [
    (lambda: count.weight_bytes(OLMOE, "bf16"), "dtype='bf16': did you mean 'bfloat16'"),
    (lambda: count.kv_cache_bytes(OLMOE, 0, 1, "float8"), "batch=0: must be at least 1"),
    (lambda: count.kv_cache_bytes(OLMOE, 1, 0, "float8"), "context=0: must be at least 1"),
    (lambda: count.forward_flops_per_token(OLMOE, 0), "seq_len=0: must be at least 1"),
    (lambda: count.decode_flops_per_token(OLMOE, 0), "context=0: must be at least 1"),
    (lambda: dataclasses.replace(OLMOE, n_layers=2.5), "n_layers=2.5: must be a whole number"),
    (lambda: dataclasses.replace(OLMOE, d_expert="8"), "d_expert='8': must be a whole number"),
    (lambda: dataclasses.replace(OLMOE, head_dim=2.5), "head_dim=2.5: must be at least 1, or none"),
])
def test_refuses(call, message):
  with pytest.raises(FieldError, match=message):
    call()


def test_counts_take_arrays():
  from moe_jax.arch.iso_search import Shapes
  template = dataclasses.replace(OLMOE, n_shared_experts=1, n_dense_layers=2)
  layers, widths = np.array([3, 5, 9]), np.array([64, 128, 96])
  shapes = Shapes(template, layers, widths, widths // 2, np.array([4, 8, 16]),
                  np.array([1, 2, 4]))
  one_by_one = [dataclasses.replace(template, n_layers=int(n), d_model=int(d),
                                    d_expert=int(d) // 2, n_exp=e, n_topk=e // 4)
                for n, d, e in zip(layers, widths, (4, 8, 16), strict=True)]
  assert count.n_total(shapes).tolist() == [count.n_total(arch) for arch in one_by_one]
  assert count.n_active(shapes).tolist() == [count.n_active(arch) for arch in one_by_one]
