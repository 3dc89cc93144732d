import fractions
import functools
import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.moe import dispatch, router
from moe_jax.moe.experts import Experts, swiglu
from moe_jax.moe.layer import Semantics, moe_layer

swiglu = functools.partial(swiglu, platform="cpu")

# (groups, tokens in a group, experts, n_topk, capacity): few shapes, so that each compiles once,
# and many assignments.
SHAPES = [(1, 1, 1, 1, 1), (1, 24, 9, 2, 3), (3, 8, 5, 4, 2), (4, 12, 6, 3, 12), (2, 16, 2, 1, 5),
          (2, 7, 9, 9, 1)]
SEEDS = st.integers(0, 2**31 - 1)
assign_slots = jax.jit(dispatch.assign_slots, static_argnums=(1, 2, 3))


def random_assignment(n_tokens, n_exp, n_topk, seed):
  """Each token goes to n_topk different experts, some experts much more often."""
  rng = np.random.default_rng(seed)
  scores_TE = rng.normal(size=(n_tokens, n_exp)) + rng.normal(size=n_exp) * 2
  return np.argsort(-scores_TE, axis=1)[:, :n_topk].astype(np.int32)


def slots_by_hand(expert_TK, n_exp, group_tokens, capacity, priority_TK=None):
  """The same map by counting: assignment by assignment, in the order in which they are served."""
  if priority_TK is None:
    priority_TK = np.zeros(expert_TK.shape)
  n_tokens, n_topk = expert_TK.shape
  n_groups = n_tokens // group_tokens
  n_slots = n_exp * n_groups * capacity
  assignment_S = np.full(n_slots, n_tokens * n_topk)
  slot_TK = np.full((n_tokens, n_topk), n_slots)
  for group in range(n_groups):
    used = [0] * n_exp
    served = sorted((-priority_TK[t, k], t, k) for k in range(n_topk)
                    for t in range(group * group_tokens, (group + 1) * group_tokens))
    for _, t, k in served:
      e = expert_TK[t, k]
      if used[e] < capacity:
        slot_TK[t, k] = (e * n_groups + group) * capacity + used[e]
        assignment_S[slot_TK[t, k]] = k * n_tokens + t
        used[e] += 1
  return assignment_S, slot_TK


@hypothesis.given(shape=st.sampled_from(SHAPES), seed=SEEDS, by_score=st.booleans())
@hypothesis.settings(max_examples=150, deadline=None)
def test_slots_equal_counting_by_hand(shape, seed, by_score):
  n_groups, group_tokens, n_exp, n_topk, capacity = shape
  expert_TK = random_assignment(n_groups * group_tokens, n_exp, n_topk, seed)
  # Few different priorities, so that some are equal.
  priority_TK = np.random.default_rng(seed).integers(0, 4, expert_TK.shape) / 4
  priority_TK = priority_TK.astype(np.float32) if by_score else None
  slots = assign_slots(jnp.asarray(expert_TK), n_exp, group_tokens, capacity, priority_TK)
  assignment_S, slot_TK = slots_by_hand(expert_TK, n_exp, group_tokens, capacity, priority_TK)
  np.testing.assert_array_equal(slots.assignment_S, assignment_S)
  np.testing.assert_array_equal(slots.slot_KT.T, slot_TK)


@hypothesis.given(shape=st.sampled_from(SHAPES), seed=SEEDS)
@hypothesis.settings(max_examples=100, deadline=None)
def test_slot_invariants(shape, seed):
  n_groups, group_tokens, n_exp, n_topk, capacity = shape
  expert_TK = random_assignment(n_groups * group_tokens, n_exp, n_topk, seed)
  slots = assign_slots(jnp.asarray(expert_TK), n_exp, group_tokens, capacity)
  slot_TK = np.asarray(slots.slot_KT).T
  kept = slot_TK < len(slots.assignment_S)
  for group in range(n_groups):
    rows = slice(group * group_tokens, (group + 1) * group_tokens)
    wanted_E = np.bincount(expert_TK[rows].ravel(), minlength=n_exp)
    kept_E = np.bincount(expert_TK[rows][kept[rows]], minlength=n_exp)
    # At most `capacity` an expert and group, and no slot stays empty while one is dropped.
    np.testing.assert_array_equal(kept_E, np.minimum(wanted_E, capacity))
    for e in range(n_exp):  # later positions drop first
      mine = kept[rows][expert_TK[rows] == e]
      assert (np.diff(mine.astype(int)) <= 0).all()
  used = slot_TK[kept]
  assert len(set(used)) == len(used)  # one assignment a slot
  assert kept.sum(1).max() <= n_topk  # a token at most n_topk experts


@hypothesis.given(factor=st.decimals("0.05", "8", places=2), tokens=st.integers(1, 4096),
                  n_exp=st.integers(1, 256), n_topk=st.integers(1, 16))
@hypothesis.settings(max_examples=200, deadline=None)
def test_capacity_is_the_exact_ceiling(factor, tokens, n_exp, n_topk):
  n_topk = min(n_topk, n_exp)
  exact = math.ceil(fractions.Fraction(factor) * tokens * n_topk / n_exp)
  assert dispatch.expert_capacity(float(factor), tokens, n_topk, n_exp) == min(exact, tokens)


def test_capacity_does_not_round_up_what_is_whole():
  assert dispatch.expert_capacity(1.1, 10, 1, 1) == 10  # 11, but a group has 10 tokens
  assert dispatch.expert_capacity(1.1, 100, 1, 10) == 11
  assert dispatch.expert_capacity(1.25, 256, 2, 8) == 80


def random_layer(n_tokens=48, d_model=8, n_exp=6, d_expert=5, seed=0):
  keys = jax.random.split(jax.random.key(seed), 5)
  x_TD = jax.random.normal(keys[0], (n_tokens, d_model))
  w_router_DE = jax.random.normal(keys[1], (d_model, n_exp))
  experts = Experts(jax.random.normal(keys[2], (n_exp, d_model, d_expert)),
                    jax.random.normal(keys[3], (n_exp, d_model, d_expert)),
                    jax.random.normal(keys[4], (n_exp, d_expert, d_model)))
  return x_TD, w_router_DE, experts


def run(x_TD, w_router_DE, experts, semantics, counted_T=None):
  return moe_layer(x_TD, w_router_DE, functools.partial(swiglu, experts=experts), semantics,
                   counted_T)


def by_hand(x_TD, w_router_DE, experts, n_topk, norm_topk_prob):
  """Token by token in NumPy float64."""
  x_TD, w_router_DE = np.float64(x_TD), np.float64(w_router_DE)
  gate_EDF, up_EDF, down_EFD = (np.float64(w) for w in experts)
  y_TD = np.zeros_like(x_TD)
  for t, x_D in enumerate(x_TD):
    logit_E = x_D @ w_router_DE
    prob_E = np.exp(logit_E - logit_E.max())
    prob_E /= prob_E.sum()
    chosen = np.argsort(-prob_E)[:n_topk]
    weight_K = prob_E[chosen] / (prob_E[chosen].sum() if norm_topk_prob else 1)
    for e, weight in zip(chosen, weight_K, strict=True):
      gate_F = x_D @ gate_EDF[e]
      y_TD[t] += weight * (gate_F / (1 + np.exp(-gate_F)) * (x_D @ up_EDF[e])) @ down_EFD[e]
  return y_TD


@pytest.mark.parametrize("norm_topk_prob", [True, False])
@pytest.mark.parametrize("n_topk", [1, 2, 6])
def test_reference_is_the_formula(n_topk, norm_topk_prob):
  layer = random_layer()
  y_TD, sums = run(*layer, Semantics(n_topk, norm_topk_prob, 48, 0, "reference"))
  np.testing.assert_allclose(y_TD, by_hand(*layer, n_topk, norm_topk_prob), rtol=1e-4,
                             atol=1e-4)
  assert sums.dropped == 0


@pytest.mark.parametrize("n_topk", [1, 3, 6])
def test_capacity_equals_reference_where_nothing_drops(n_topk):
  """Outputs and every gradient, the router's too."""
  layer = random_layer()

  def loss(layer, dispatch):
    y_TD, sums = run(*layer, Semantics(n_topk, n_topk > 1, 12, 12, dispatch))
    return (y_TD * jnp.cos(jnp.arange(y_TD.size).reshape(y_TD.shape))).sum(), sums

  (value, sums), grads = jax.value_and_grad(loss, has_aux=True)(layer, "capacity")
  (truth, _), true_grads = jax.value_and_grad(loss, has_aux=True)(layer, "reference")
  assert sums.dropped == 0
  np.testing.assert_allclose(value, truth, rtol=1e-5)
  for grad, true_grad in zip(jax.tree.leaves(grads), jax.tree.leaves(true_grads), strict=True):
    np.testing.assert_allclose(grad, true_grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("capacity", [1, 3])
def test_gradient_with_drops_equals_automatic_differentiation(capacity):
  """The hand-written transposes against JAX's own gradient of the same plain gathers."""
  x_TD, w_router_DE, experts = layer = random_layer()
  semantics = Semantics(2, True, 12, capacity)

  def plain_loss(layer):
    x_TD, w_router_DE, experts = layer
    routing = router.route(x_TD, w_router_DE, 2, True)
    slots = dispatch.assign_slots(routing.expert_TK, 6, 12, capacity)
    padded = jnp.concatenate([x_TD, jnp.zeros((1, x_TD.shape[1]))])
    token_S = jnp.where(slots.assignment_S < 96, slots.assignment_S % 48, 48)
    y_SD = swiglu(padded[token_S].reshape(6, -1, 8), experts=experts).reshape(-1, 8)
    y_SD = jnp.concatenate([y_SD, jnp.zeros((1, 8))])
    return ((y_SD[slots.slot_KT.T] * routing.weight_TK[..., None]).sum(1) ** 2).sum()

  def fast_loss(layer):
    return (run(*layer, semantics)[0] ** 2).sum()

  assert run(*layer, semantics)[1].dropped > 0
  plain, fast = jax.grad(plain_loss)(layer), jax.grad(fast_loss)(layer)
  for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(fast), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)


def test_dropped_tokens_keep_only_their_served_experts():
  """A dropped assignment adds nothing and changes no other weight."""
  layer = random_layer()
  semantics = Semantics(2, True, 48, 4)
  y_TD, sums = run(*layer, semantics)
  routing = router.route(layer[0], layer[1], 2, True)
  _, slot_TK = slots_by_hand(np.asarray(routing.expert_TK), 6, 48, 4)
  kept_TK = slot_TK < 6 * 4
  assert int(sums.dropped) == (~kept_TK).sum() > 0
  expected_TD, _ = dispatch.reference_dispatch(
      layer[0], routing._replace(weight_TK=routing.weight_TK * kept_TK),
      functools.partial(swiglu, experts=layer[2]))
  np.testing.assert_allclose(y_TD, expected_TD, rtol=1e-5, atol=1e-4)


def test_by_score_the_lowest_weights_drop_and_padding_before_all():
  layer = random_layer()
  by_score = Semantics(2, True, 24, 5, drop_order="score")
  routing = router.route(layer[0], layer[1], 2, True)
  counted_T = np.arange(48) % 5 > 0
  for counted in (None, counted_T):
    priority_TK = np.asarray(routing.weight_TK)
    if counted is not None:
      priority_TK = np.where(counted[:, None], priority_TK, -1)
    _, slot_TK = slots_by_hand(np.asarray(routing.expert_TK), 6, 24, 5, priority_TK)
    kept_TK = slot_TK < 6 * 2 * 5
    expected_TD, _ = dispatch.reference_dispatch(
        layer[0], routing._replace(weight_TK=routing.weight_TK * kept_TK),
        functools.partial(swiglu, experts=layer[2]))
    y_TD, sums = run(*layer, by_score, counted)
    np.testing.assert_allclose(y_TD, expected_TD, rtol=1e-5, atol=1e-4)
    lost_TK = ~kept_TK if counted is None else ~kept_TK & counted[:, None]
    assert int(sums.dropped) == lost_TK.sum() > 0
    assert int(sums.left_behind) == lost_TK.all(1).sum()
  by_position = run(*layer, by_score._replace(drop_order="position"))[0]
  assert np.abs(run(*layer, by_score)[0] - by_position).max() > 0.1


@hypothesis.given(seed=st.integers(0, 2**31 - 1))
@hypothesis.settings(max_examples=10, deadline=None)
def test_permuting_a_group_permutes_the_outputs_where_nothing_drops(seed):
  x_TD, w_router_DE, experts = random_layer()
  rng = np.random.default_rng(seed)
  permutation = np.concatenate([g * 12 + rng.permutation(12) for g in range(4)])
  semantics = Semantics(2, True, 12, 12)
  y_TD, _ = run(x_TD, w_router_DE, experts, semantics)
  permuted_TD, _ = run(x_TD[permutation], w_router_DE, experts, semantics)
  np.testing.assert_allclose(permuted_TD, y_TD[permutation], rtol=1e-5, atol=1e-5)


def test_bfloat16_stays_bfloat16_and_close_to_the_reference():
  x_TD, w_router_DE, experts = random_layer()
  x_TD = x_TD.astype(jnp.bfloat16)
  y_TD, _ = run(x_TD, w_router_DE, experts, Semantics(2, True, 12, 12))
  truth_TD, _ = run(x_TD, w_router_DE, experts, Semantics(2, True, 12, 0, "reference"))
  assert y_TD.dtype == truth_TD.dtype == jnp.bfloat16
  # Four roundings of relative size 2^-9 on sums of a few tens of terms.
  scale = float(jnp.abs(truth_TD.astype(jnp.float32)).max())
  np.testing.assert_allclose(np.float32(y_TD), np.float32(truth_TD), atol=scale * 2**-6)


def test_no_array_grows_with_tokens_times_experts_times_capacity():
  """The index-based promise, read off the jaxpr: no intermediate is as large as [T, E, C]."""
  n_tokens, d_model, n_exp, capacity = 256, 8, 32, 64
  x_TD, w_router_DE, experts = random_layer(n_tokens, d_model, n_exp, 4)
  semantics = Semantics(2, True, n_tokens, capacity)
  jaxpr = jax.make_jaxpr(jax.grad(
      lambda x: (run(x, w_router_DE, experts, semantics)[0] ** 2).sum()))(x_TD)
  largest = max(math.prod(shape) for shape in _shapes(jaxpr.jaxpr))
  assert n_exp * capacity * d_model <= largest < n_tokens * n_exp * capacity // 8


def _shapes(jaxpr):
  for equation in jaxpr.eqns:
    for variable in equation.outvars:
      yield variable.aval.shape
    for parameter in equation.params.values():
      # the branches of a `cond`, by which a platform is chosen, are a tuple
      for part in parameter if isinstance(parameter, tuple) else (parameter,):
        inner = getattr(part, "jaxpr", part)
        if hasattr(inner, "eqns"):
          yield from _shapes(inner)
