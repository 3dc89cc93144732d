import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.mesh import make_mesh
from moe_jax.model import attention, functional, init
from moe_jax.model.transformer import MoE, SwiGLU, gather_whole
from moe_jax.moe.experts import Experts, swiglu
from moe_jax.moe.layer import Semantics, moe_layer
from moe_jax.moe.router import route
from tests.small import ARCH, small_config

swiglu = functools.partial(swiglu, platform="cpu")


def build(config):
  """(params, logits function on one device)."""
  mesh = make_mesh(config, jax.devices()[:1])
  run = jax.jit(lambda params, tokens, segments: functional.apply(
      config, params, tokens, segments, mesh)[0])
  return functional.init_params(config, mesh), run


def tokens_like(shape=(8, 16), seed=0):
  return jnp.asarray(np.random.default_rng(seed).integers(0, 256, shape), jnp.int32)


def test_logits_are_causal():
  params, run = build(small_config(moe={"dispatch": "reference"}))
  tokens_BS, segments_BS = tokens_like(), jnp.zeros((8, 16), jnp.int32)
  changed_BS = tokens_BS.at[:, 10].add(1)
  before, after = run(params, tokens_BS, segments_BS), run(params, changed_BS, segments_BS)
  np.testing.assert_array_equal(before[:, :10], after[:, :10])
  assert np.abs(before - after)[:, 10:].max(-1).min() > 1e-4  # every later position saw it


@pytest.mark.parametrize("mask_documents", [True, False])
def test_attention_stops_at_document_boundaries(mask_documents):
  params, run = build(small_config(moe={"dispatch": "reference"},
                                   data={"mask_documents": mask_documents}))
  tokens_BS = tokens_like()
  segments_BS = jnp.broadcast_to(jnp.arange(16) // 6, (8, 16))
  changed_BS = tokens_BS.at[:, 2].add(1)
  difference = np.abs(run(params, tokens_BS, segments_BS)
                      - run(params, changed_BS, segments_BS)).max((0, 2))
  assert difference[2:6].min() > 1e-4
  assert (difference[6:] == 0).all() == mask_documents


def test_a_packed_document_is_the_document_alone():
  """Positions count from the row's start, but only their differences matter."""
  params, run = build(small_config(moe={"dispatch": "reference"}))
  tokens_BS = tokens_like()
  packed = run(params, tokens_BS, jnp.broadcast_to(jnp.arange(16) >= 5, (8, 16)) + 0)
  alone_BS = jnp.roll(tokens_BS, -5, axis=1)
  alone = run(params, alone_BS, jnp.broadcast_to(jnp.arange(16) >= 11, (8, 16)) + 0)
  np.testing.assert_allclose(packed[:, 5:], alone[:, :11], rtol=1e-4, atol=1e-5)


def test_a_dense_layer_rounds_as_an_expert_does():
  """Once, after silu(gate) * up in float32: else bfloat16 would favour one of them."""
  layer = SwiGLU(16, 24, 1.0, nnx.Rngs(0))
  x_BSD = jax.random.normal(jax.random.key(1), (2, 8, 16), jnp.bfloat16)
  weights = [w[...].astype(jnp.bfloat16) for w in (layer.w_gate_DF, layer.w_up_DF,
                                                   layer.w_down_FD)]
  ours = layer(x_BSD, lambda w: w[...].astype(jnp.bfloat16), make_mesh(small_config(),
                                                                      jax.devices()[:1]))
  theirs = swiglu(x_BSD.reshape(1, 16, 16), experts=Experts(*(w[None] for w in weights)),
                  platform="cpu")
  np.testing.assert_array_equal(np.float32(ours).reshape(16, 16), np.float32(theirs[0]))


def test_one_expert_and_two_shared_ones_equal_a_dense_model():
  """n_exp = n_topk = 1 without normalization: the weight is 1 and nothing can drop.

  Experts that all tokens see are one feed-forward layer, as wide as all of them together.
  """
  arch = dataclasses.replace(ARCH, n_exp=1, n_topk=1, n_shared_experts=2)
  params, run = build(small_config(arch))
  dense_arch = dataclasses.replace(ARCH, n_dense_layers=arch.n_layers,
                                   d_dense=3 * arch.d_expert)
  dense_params, dense_run = build(small_config(dense_arch))
  layers, moe = params["moe_layers"], params["moe_layers"]["moe"]

  def as_dense(moe):
    routed = {"w_gate_DF": moe["w_gate_EDF"][:, 0], "w_up_DF": moe["w_up_EDF"][:, 0],
              "w_down_FD": moe["w_down_EFD"][:, 0]}
    return {name: jnp.concatenate([weight, moe["shared"][name]], axis=name.index("F") - len(name))
            for name, weight in routed.items()}

  dense_params = {name: leaf for name, leaf in params.items() if name != "moe_layers"} | {
      "dense_layers": {name: leaf for name, leaf in layers.items() if name != "moe"} | {
          "ff": as_dense(moe)}}
  tokens_BS, segments_BS = tokens_like(), jnp.zeros((8, 16), jnp.int32)

  def loss(run, params):
    return (run(params, tokens_BS, segments_BS) ** 2).mean()

  value, grads = jax.value_and_grad(lambda p: loss(run, p))(params)
  dense_value, dense_grads = jax.value_and_grad(lambda p: loss(dense_run, p))(dense_params)
  np.testing.assert_allclose(value, dense_value, rtol=1e-6)
  for name, grad in as_dense(grads["moe_layers"]["moe"]).items():
    np.testing.assert_allclose(grad, dense_grads["dense_layers"]["ff"][name], rtol=1e-4,
                               atol=1e-6, err_msg=name)
  np.testing.assert_allclose(grads["embedding_VD"], dense_grads["embedding_VD"], rtol=1e-4,
                             atol=1e-6)


def test_shared_experts_add_to_the_routed_ones():
  arch = dataclasses.replace(ARCH, n_shared_experts=2)
  config = small_config(arch, moe={"dispatch": "reference"})
  params, run = build(config)
  shared = params["moe_layers"]["moe"]["shared"]
  assert shared["w_gate_DF"].shape == (2, 16, 24)
  tokens_BS, segments_BS = tokens_like(), jnp.zeros((8, 16), jnp.int32)
  full = run(params, tokens_BS, segments_BS)
  params["moe_layers"]["moe"]["shared"] = jax.tree.map(jnp.zeros_like, shared)
  without = run(params, tokens_BS, segments_BS)
  del params["moe_layers"]["moe"]["shared"]
  plain = build(dataclasses.replace(config, arch=ARCH))[1](params, tokens_BS, segments_BS)
  np.testing.assert_allclose(without, plain, rtol=1e-5, atol=1e-6)
  assert np.abs(full - without).max() > 1e-2


def test_grouped_queries_share_keys_and_values():
  grouped = dataclasses.replace(ARCH, n_heads=4, n_kv_heads=2)
  params, run = build(small_config(grouped))
  full_params, full_run = build(small_config(dataclasses.replace(grouped, n_kv_heads=4)))
  attention_params = params["moe_layers"]["attention"]
  full_params = jax.tree.map(lambda leaf: leaf, params)
  full_params["moe_layers"]["attention"] = attention_params | {
      name: jnp.repeat(attention_params[name], 2, axis=2) for name in ("w_key_DKh", "w_value_DKh")}
  tokens_BS, segments_BS = tokens_like(), jnp.zeros((8, 16), jnp.int32)
  np.testing.assert_allclose(run(params, tokens_BS, segments_BS),
                             full_run(full_params, tokens_BS, segments_BS), rtol=1e-4, atol=1e-5)


def test_tied_embeddings_are_the_head():
  arch = dataclasses.replace(ARCH, tie_embeddings=True)
  tied, run = build(small_config(arch))
  assert "w_head_DV" not in tied
  untied_run = build(small_config(ARCH))[1]
  tokens_BS, segments_BS = tokens_like(), jnp.zeros((8, 16), jnp.int32)
  np.testing.assert_allclose(
      run(tied, tokens_BS, segments_BS),
      untied_run(tied | {"w_head_DV": tied["embedding_VD"].T}, tokens_BS, segments_BS),
      rtol=1e-5, atol=1e-6)


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_masters_and_logits():
  config = small_config(model={"compute_dtype": "bfloat16"}, moe={"dispatch": "reference"})
  params, run = build(config)
  exact_run = build(small_config(moe={"dispatch": "reference"}))[1]
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
  tokens_BS, segments_BS = tokens_like(), jnp.zeros((8, 16), jnp.int32)
  logits, exact = run(params, tokens_BS, segments_BS), exact_run(params, tokens_BS, segments_BS)
  assert logits.dtype == jnp.float32
  error = np.abs(logits - exact)
  assert error.max() > 1e-4 and np.median(error) < 2**-5  # it rounds, and no more than that


def test_a_bfloat16_model_routes_by_the_routers_float32_weights():
  """Experts' weights that differ by less than bfloat16 tells apart: rounded, all would tie."""
  config = small_config(model={"compute_dtype": "bfloat16"})
  mesh = make_mesh(config, jax.devices()[:1])
  moe = MoE(config, nnx.Rngs(0))
  w_router_DE = jnp.ones((ARCH.d_model, 1)) * (1 + jnp.arange(ARCH.n_exp) * 2.0**-12)
  moe.w_router_DE[...] = w_router_DE
  x_BSD = jax.random.normal(jax.random.key(0), (8, 16, ARCH.d_model), jnp.bfloat16)
  gather = functools.partial(gather_whole, mesh=mesh, dtype=x_BSD.dtype)
  _, sums = jax.jit(lambda x_BSD: moe(x_BSD, gather, mesh, None, None))(x_BSD)

  def assigned(w_router_DE):
    expert_TK = route(x_BSD.reshape(-1, ARCH.d_model), w_router_DE, ARCH.n_topk, True).expert_TK
    return np.bincount(expert_TK.ravel(), minlength=ARCH.n_exp)

  np.testing.assert_array_equal(sums.assigned_E, assigned(w_router_DE))
  rounded = assigned(w_router_DE.astype(jnp.bfloat16))
  assert (rounded[:ARCH.n_topk] == 8 * 16).all()  # ties go to the first experts
  assert sums.assigned_E[-1] > 8


@pytest.mark.parametrize("shift", [1, 7])
def test_rotary_scores_depend_on_the_distance_alone(shift):
  vectors = jax.random.normal(jax.random.key(0), (2, 8))
  x_BSHh = jnp.broadcast_to(vectors[:, None, None], (2, 16, 1, 8))
  query_Sh, key_Sh = attention.rotate(x_BSHh, 10_000.0)[:, :, 0]
  scores_SS = query_Sh @ key_Sh.T
  np.testing.assert_allclose(scores_SS[shift:, shift:], scores_SS[:-shift, :-shift], rtol=1e-4,
                             atol=1e-5)
  assert np.abs(scores_SS[0] - scores_SS[0, 0]).max() > 0.1


@pytest.mark.parametrize("n_topk,norm,router", [
    (2, True, "softmax"), (8, True, "softmax"), (8, False, "softmax"), (1, False, "softmax"),
    (2, True, "sigmoid"), (4, False, "sigmoid"), (4, False, "expert_choice")])
def test_routed_outputs_start_at_the_scale_of_a_dense_layer(n_topk, norm, router):
  """Without the factor of init.py they would be 1.4 to 13 times smaller."""
  arch = dataclasses.replace(ARCH, d_model=64, d_expert=64, n_exp=16, n_topk=n_topk)
  layer = small_config(arch, moe={"dispatch": "reference", "norm_topk_prob": norm,
                                  "router": router})
  params, _ = build(layer)
  keys = jax.random.split(jax.random.key(0), 2)
  x_TD = jax.random.normal(keys[0], (512, 64))
  moe = jax.tree.map(lambda leaf: leaf[0], params["moe_layers"]["moe"])
  experts = Experts(moe["w_gate_EDF"], moe["w_up_EDF"], moe["w_down_EFD"])
  y_TD, _ = moe_layer(x_TD, moe["w_router_DE"], functools.partial(swiglu, experts=experts),
                      Semantics.of(layer),
                      bias_E=jnp.zeros(16) if router == "sigmoid" else None)
  dense_TD = swiglu(x_TD[None], experts=Experts(*(w[:1] for w in experts)))[0]
  dense_TD /= init.routed_scale(arch, layer.moe)
  assert 0.8 < y_TD.std() / dense_TD.std() < 1.25


@pytest.mark.parametrize("field,value", [("rope_theta", 100.0), ("norm_eps", 0.5)])
def test_the_models_numerics_are_those_of_the_configuration(field, value):
  params, run = build(small_config(moe={"dispatch": "reference"}))
  other_run = build(small_config(moe={"dispatch": "reference"}, model={field: value}))[1]
  tokens_BS, segments_BS = tokens_like(), jnp.zeros((8, 16), jnp.int32)
  difference = run(params, tokens_BS, segments_BS) - other_run(params, tokens_BS, segments_BS)
  assert np.abs(difference).max() > 1e-3
