"""Dropless dispatch is the reference, whatever the routing, forward and gradient."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.moe import dispatch, dropless, grouped_matmul
from moe_jax.moe.experts import Experts, grouped_swiglu, swiglu
from moe_jax.moe.layer import Semantics, moe_layer
from moe_jax.moe.router import Routing

swiglu = functools.partial(swiglu, platform="cpu")

# (tokens, experts, n_topk): a prime number of tokens, n_topk = n_exp, one token.
SHAPES = [(101, 9, 4), (37, 5, 5), (1, 4, 1)]
D_MODEL, D_EXPERT = 8, 5
PLATFORMS = ["cpu", "tpu"]


def random_routing(n_tokens, n_exp, n_topk, kind, seed):
  """Routings of every kind: even, skewed, all tokens at the same experts."""
  rng = np.random.default_rng(seed)
  spread = {"even": 0, "skewed": 3, "same": 1e6}[kind]
  scores_TE = rng.normal(size=(n_tokens, n_exp)) + spread * rng.normal(size=n_exp)
  expert_TK = np.argsort(-scores_TE, axis=1)[:, :n_topk].astype(np.int32)
  weight_TK = rng.uniform(size=expert_TK.shape).astype(np.float32)
  zeros_TE = np.zeros(scores_TE.shape, np.float32)
  return Routing(expert_TK, weight_TK, zeros_TE, zeros_TE)


def random_tokens(n_tokens, n_exp, seed, dtype=jnp.float32):
  rng = np.random.default_rng(seed)
  shapes = ((n_tokens, D_MODEL), (n_exp, D_MODEL, D_EXPERT), (n_exp, D_MODEL, D_EXPERT),
            (n_exp, D_EXPERT, D_MODEL))
  x_TD, *experts = (rng.normal(size=shape) for shape in shapes)
  return jnp.asarray(x_TD, dtype), Experts(*(jnp.asarray(w, jnp.float32) for w in experts))


@functools.partial(jax.jit, static_argnums=3)
def value_and_grads(x_TD, routing, experts, platform):
  """Of the tokens, the routing weights and the experts; `platform` None is the reference."""

  def loss(x_TD, weight_TK, experts):
    given = routing._replace(weight_TK=weight_TK)
    if platform is None:
      y_TD, dropped_T = dispatch.reference_dispatch(
          x_TD, given, functools.partial(swiglu, experts=experts))
    else:
      y_TD, dropped_T = dropless.dropless_dispatch(
          x_TD, given, functools.partial(grouped_swiglu, experts=experts, platform=platform))
    scale = jnp.cos(jnp.arange(y_TD.size).reshape(y_TD.shape))
    return (y_TD.astype(jnp.float32) * scale).sum(), (y_TD, dropped_T)

  (_, out), grads = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(
      x_TD, routing.weight_TK, experts)
  return out, grads


@pytest.mark.parametrize("platform", PLATFORMS)
@hypothesis.given(shape=st.sampled_from(SHAPES), kind=st.sampled_from(["even", "skewed", "same"]),
                  seed=st.integers(0, 2**31 - 2))
@hypothesis.settings(max_examples=40, deadline=None)
def test_dropless_equals_the_reference(platform, shape, kind, seed):
  routing = random_routing(*shape, kind, seed)
  x_TD, experts = random_tokens(*shape[:2], seed + 1)
  ours = value_and_grads(x_TD, routing, experts, platform)
  truth = value_and_grads(x_TD, routing, experts, None)
  assert ours[0][1].shape == (shape[0],) and not ours[0][1].any()
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(truth), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * max(1, float(jnp.abs(b).max())))


@hypothesis.given(shape=st.sampled_from(SHAPES), kind=st.sampled_from(["even", "skewed", "same"]),
                  seed=st.integers(0, 2**31 - 1))
@hypothesis.settings(max_examples=60, deadline=None)
def test_slots_sort_every_assignment(shape, kind, seed):
  n_tokens, n_exp, n_topk = shape
  expert_TK = random_routing(*shape, kind, seed).expert_TK
  slots, size_E = jax.jit(dropless.sort_slots, static_argnums=1)(expert_TK, n_exp)
  np.testing.assert_array_equal(size_E, np.bincount(expert_TK.ravel(), minlength=n_exp))
  # One slot for each assignment, and the two maps are each other's inverse.
  slot_A = np.asarray(slots.slot_KT).ravel()
  np.testing.assert_array_equal(np.asarray(slots.assignment_S)[slot_A],
                                np.arange(n_tokens * n_topk))
  assert (np.asarray(slots.assignment_S[n_tokens * n_topk:]) == n_tokens * n_topk).all()
  assert len(slots.assignment_S) == n_tokens * n_topk + grouped_matmul.SPARE_ROWS
  # In an expert's group, which follows the one before, earlier positions come first.
  order = np.argsort(expert_TK.ravel(), kind="stable")
  np.testing.assert_array_equal(np.asarray(slots.slot_KT).T.ravel()[order],
                                np.arange(n_tokens * n_topk))


@functools.partial(jax.jit, static_argnums=(3, 4, 5, 6))
def capacity_value_and_grads(x_TD, routing, experts, group_tokens, capacity, by_score, packed):
  """Of the tokens, the routing weights and the experts, with slots as they are or packed."""

  def loss(x_TD, weight_TK, experts):
    priority_TK = jnp.round(4 * routing.weight_TK) if by_score else None  # some are equal
    if packed:
      dispatched = dropless.packed_dispatch
      run_rows = functools.partial(grouped_swiglu, experts=experts, platform="cpu")
    else:
      dispatched = dispatch.capacity_dispatch
      run_rows = functools.partial(swiglu, experts=experts)
    y_TD, dropped_T = dispatched(x_TD, routing._replace(weight_TK=weight_TK), run_rows,
                                 group_tokens=group_tokens, capacity=capacity,
                                 priority_TK=priority_TK)
    scale = jnp.cos(jnp.arange(y_TD.size).reshape(y_TD.shape))
    return (y_TD * scale).sum(), (y_TD, dropped_T)

  return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(
      x_TD, routing.weight_TK, experts)


@hypothesis.given(groups=st.sampled_from([(101, 101, 40), (48, 12, 3), (48, 12, 12), (1, 1, 1)]),
                  kind=st.sampled_from(["even", "skewed", "same"]), by_score=st.booleans(),
                  seed=st.integers(0, 2**31 - 2))
@hypothesis.settings(max_examples=40, deadline=None)
def test_packed_slots_compute_and_drop_what_padded_ones_do(groups, kind, by_score, seed):
  n_tokens, group_tokens, capacity = groups
  routing = random_routing(n_tokens, 9, 4, kind, seed)
  arguments = (*random_tokens(n_tokens, 9, seed + 1), group_tokens, capacity, by_score)
  (_, (y_TD, dropped_T)), grads = capacity_value_and_grads(
      arguments[0], routing, *arguments[1:], True)
  (_, (truth_TD, truth_T)), true_grads = capacity_value_and_grads(
      arguments[0], routing, *arguments[1:], False)
  np.testing.assert_array_equal(dropped_T, truth_T)
  for a, b in zip(jax.tree.leaves((y_TD, grads)), jax.tree.leaves((truth_TD, true_grads)),
                  strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * max(1, float(jnp.abs(b).max())))


@pytest.mark.parametrize("platform", PLATFORMS)
def test_bfloat16_stays_bfloat16_and_close_to_the_reference(platform):
  routing = random_routing(101, 9, 4, "skewed", 0)
  x_TD, experts = random_tokens(101, 9, 1, jnp.bfloat16)
  (y_TD, _), _ = value_and_grads(x_TD, routing, experts, platform)
  (truth_TD, _), _ = value_and_grads(x_TD, routing, experts, None)
  assert y_TD.dtype == truth_TD.dtype == jnp.bfloat16
  # Weights, hidden values and outputs are each rounded to 8 bits, at most five on a path.
  scale = float(jnp.abs(truth_TD.astype(jnp.float32)).max())
  np.testing.assert_allclose(np.float32(y_TD), np.float32(truth_TD), atol=scale * 5 * 2**-8)


def test_the_layer_routes_sorts_and_counts():
  x_TD, experts = random_tokens(48, 6, 0)
  w_router_DE = jnp.asarray(np.random.default_rng(1).normal(size=(D_MODEL, 6)), jnp.float32)
  y_TD, sums = moe_layer(x_TD, w_router_DE,
                         functools.partial(grouped_swiglu, experts=experts, platform="cpu"),
                         Semantics(2, True, 48, 0, "dropless"))
  truth_TD, true_sums = moe_layer(x_TD, w_router_DE, functools.partial(swiglu, experts=experts),
                                  Semantics(2, True, 48, 0, "reference"))
  np.testing.assert_allclose(y_TD, truth_TD, rtol=1e-5, atol=1e-5)
  jax.tree.map(np.testing.assert_array_equal, sums, true_sums)
  assert sums.dropped == 0
