"""Expert choice: against loops in NumPy, its invariants, and on meshes."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.mesh import MESH_AXES
from moe_jax.moe import expert_choice
from moe_jax.moe.expert_parallel import sharded_moe_layer
from moe_jax.moe.experts import Experts, swiglu
from moe_jax.moe.layer import Semantics, moe_layer
from moe_jax.moe.router import balance_loss, router_metrics

swiglu = functools.partial(swiglu, platform="cpu")

N_EXP, N_TOPK, GROUP = 6, 2, 12
CAPACITY = GROUP * N_TOPK // N_EXP


def semantics(dispatch="capacity", n_topk=N_TOPK):
  return Semantics(n_topk, False, GROUP, 0, dispatch, router="expert_choice")


def layer(n_tokens=36, d_model=8, n_exp=N_EXP, d_expert=5):
  keys = jax.random.split(jax.random.key(1), 5)
  shapes = Experts((n_exp, d_model, d_expert), (n_exp, d_model, d_expert),
                   (n_exp, d_expert, d_model))
  return (jax.random.normal(keys[0], (n_tokens, d_model)),
          jax.random.normal(keys[1], (d_model, n_exp)),
          Experts(*map(jax.random.normal, keys[2:], shapes)))


def picked_by_hand(prob_TE, capacity):
  """Expert by expert and group by group: the set of (token, expert)."""
  return {(start + t, e) for start in range(0, len(prob_TE), GROUP)
          for e in range(prob_TE.shape[1])
          for t in np.argsort(-prob_TE[start:start + GROUP, e], kind="stable")[:capacity]}


def output_by_hand(x_TD, prob_TE, picked, experts):
  gate_EDF, up_EDF, down_EFD = (np.float64(w) for w in experts)
  y_TD = np.zeros(x_TD.shape)
  for t, e in picked:
    x_D = np.float64(x_TD[t])
    gate_F = x_D @ gate_EDF[e]
    y_TD[t] += prob_TE[t, e] * (gate_F / (1 + np.exp(-gate_F)) * (x_D @ up_EDF[e])) @ down_EFD[e]
  return y_TD


@pytest.mark.parametrize("dispatch", ["capacity", "reference"])
@pytest.mark.parametrize("n_topk", [1, 3])
def test_the_layer_is_the_formula(dispatch, n_topk):
  x_TD, w_router_DE, experts = layer()
  y_TD, sums = moe_layer(x_TD, w_router_DE, functools.partial(swiglu, experts=experts),
                         semantics(dispatch, n_topk))
  prob_TE = np.asarray(jax.nn.softmax(x_TD @ w_router_DE))
  picked = picked_by_hand(prob_TE, GROUP * n_topk // N_EXP)
  np.testing.assert_allclose(y_TD, output_by_hand(x_TD, prob_TE, picked, experts), rtol=1e-4,
                             atol=1e-4)
  assert int(sums.left_behind) == 36 - len({t for t, _ in picked})
  assert sums.dropped == 0


def test_gradients_equal_those_of_the_reference():
  def loss(parts, dispatch):
    x_TD, w_router_DE, experts = parts
    y_TD, _ = moe_layer(x_TD, w_router_DE, functools.partial(swiglu, experts=experts),
                        semantics(dispatch))
    return (y_TD * jnp.cos(jnp.arange(y_TD.size).reshape(y_TD.shape))).sum()

  ours, truth = (jax.grad(loss)(layer(), dispatch) for dispatch in ("capacity", "reference"))
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(truth), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
  assert np.abs(ours[1]).max() > 0.01  # the router learns through the weights


def test_the_gradient_of_the_reference_is_that_of_the_loop():
  """Along a random direction, by central differences of the loop in float64."""
  x_TD, w_router_DE, experts = layer()
  direction_DE = np.random.default_rng(0).normal(size=w_router_DE.shape)
  picked = picked_by_hand(np.asarray(jax.nn.softmax(x_TD @ w_router_DE)), CAPACITY)

  def by_hand(step):  # the choice stands: it has no gradient
    logit_TE = np.float64(x_TD) @ (np.float64(w_router_DE) + step * direction_DE)
    prob_TE = np.exp(logit_TE) / np.exp(logit_TE).sum(1, keepdims=True)
    return (output_by_hand(x_TD, prob_TE, picked, experts) ** 2).sum()

  def loss(w_router_DE):
    return (moe_layer(x_TD, w_router_DE, functools.partial(swiglu, experts=experts),
                      semantics())[0] ** 2).sum()

  slope = (jax.grad(loss)(w_router_DE) * direction_DE).sum()
  np.testing.assert_allclose(slope, (by_hand(1e-5) - by_hand(-1e-5)) / 2e-5, rtol=1e-3)


@hypothesis.given(seed=st.integers(0, 2**31 - 1), n_padding=st.integers(0, 24))
@hypothesis.settings(max_examples=40, deadline=None)
def test_every_expert_takes_as_many_and_padding_last(seed, n_padding):
  rng = np.random.default_rng(seed)
  # Few different logits, so that some are equal.
  logit_TE = jnp.asarray(rng.integers(-2, 3, (24, N_EXP)), jnp.float32)
  counted_T = jnp.arange(24) < 24 - n_padding
  choice = choose(logit_TE, counted_T)
  chosen_TE = np.asarray(choice.chosen_TE)
  real = np.asarray(counted_T)
  for rows in (slice(0, 12), slice(12, 24)):
    np.testing.assert_array_equal(chosen_TE[rows].sum(0), CAPACITY)
    wanted = min(CAPACITY, real[rows].sum())
    np.testing.assert_array_equal(chosen_TE[rows][real[rows]].sum(0), wanted)
    for e in range(N_EXP):  # who is picked is at least as probable as who is not
      prob_N = np.asarray(choice.prob_TE)[rows][real[rows], e]
      mine = chosen_TE[rows][real[rows], e]
      assert prob_N[mine].min(initial=1) >= prob_N[~mine].max(initial=0)
  sums = expert_choice.choice_sums(choice, counted_T)
  assert sums.tokens == 24 - n_padding
  np.testing.assert_array_equal(sums.assigned_E, chosen_TE[real].sum(0))
  assert sums.left_behind == (~chosen_TE[real].any(1)).sum()


@jax.jit
def choose(logit_TE, counted_T):
  return expert_choice.choose_tokens(logit_TE, N_TOPK, GROUP, counted_T)


def test_load_is_even_by_construction_and_the_balance_loss_is_one():
  x_TD, w_router_DE, experts = layer()
  _, sums = moe_layer(x_TD, w_router_DE, functools.partial(swiglu, experts=experts), semantics())
  metrics = router_metrics(sums)
  assert metrics["load_variation"] == metrics["dead_experts"] == metrics["drop_rate"] == 0
  np.testing.assert_allclose(balance_loss(sums), 1, rtol=1e-5)


def test_it_is_not_causal():
  """The claim for which decoding is refused: a later token changes an earlier output."""
  x_TD, w_router_DE, experts = layer()
  changed_TD = x_TD.at[-1].set(10 * x_TD[0])
  first, second = (moe_layer(x, w_router_DE, functools.partial(swiglu, experts=experts),
                             semantics())[0][:-1] for x in (x_TD, changed_TD))
  assert np.abs(first - second).max() > 0.01


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 4, 2), (2, 2, 2)], ids=str)
def test_the_same_on_a_mesh(shape):
  keys = jax.random.split(jax.random.key(0), 2)
  x_BSD = jax.random.normal(keys[0], (16, 6, 16))
  _, w_router_DE, experts = layer(d_model=16, n_exp=8, d_expert=12)
  rules = Semantics(2, False, 12, 0, router="expert_choice")

  def run(shape):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:np.prod(shape)]).reshape(shape), MESH_AXES)

    def loss(x_BSD, w_router_DE, experts):
      y_BSD, sums = sharded_moe_layer(x_BSD, w_router_DE, experts, rules, mesh)
      return (y_BSD**2).mean(), sums

    return jax.device_get(jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(
        x_BSD, w_router_DE, experts))

  for a, b in zip(jax.tree.leaves(run(shape)), jax.tree.leaves(run((1, 1, 1))), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
