import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.moe import router


def routed(n_tokens=32, d_model=8, n_exp=6, n_topk=2, norm=True, seed=0):
  keys = jax.random.split(jax.random.key(seed), 2)
  x_TD = jax.random.normal(keys[0], (n_tokens, d_model))
  w_router_DE = jax.random.normal(keys[1], (d_model, n_exp))
  return router.route(x_TD, w_router_DE, n_topk, norm)


@hypothesis.given(  # few shapes, for each is a program to compile
    shape=st.sampled_from([(1, 1), (2, 1), (5, 5), (8, 2), (16, 3), (17, 17)]),
    norm=st.booleans(), seed=st.integers(0, 1000))
@hypothesis.settings(max_examples=40, deadline=None)
def test_top_k_takes_the_most_probable_and_weights_follow(shape, norm, seed):
  n_exp, n_topk = shape
  routing = routed(n_exp=n_exp, n_topk=n_topk, norm=norm, seed=seed)
  prob_TE = np.asarray(routing.prob_TE)
  np.testing.assert_allclose(prob_TE.sum(1), 1, rtol=1e-5)
  best_TK = -np.sort(-prob_TE, axis=1)[:, :n_topk]
  chosen_TK = np.take_along_axis(prob_TE, np.asarray(routing.expert_TK), axis=1)
  np.testing.assert_array_equal(chosen_TK, best_TK)
  weight_TK = np.asarray(routing.weight_TK)
  if norm:
    np.testing.assert_allclose(weight_TK.sum(1), 1, rtol=1e-5)
    np.testing.assert_allclose(weight_TK, best_TK / best_TK.sum(1, keepdims=True), rtol=1e-5)
  else:
    np.testing.assert_array_equal(weight_TK, best_TK)


@pytest.mark.parametrize("n_topk", [1, 3, 7])
def test_both_ways_to_the_chosen_scores_agree_forward_and_backward(n_topk):
  score_TE = jax.random.normal(jax.random.key(0), (5, 7))
  _, expert_TK = jax.lax.top_k(jax.random.normal(jax.random.key(1), (5, 7)), n_topk)
  cotangent_TK = jax.random.normal(jax.random.key(2), (5, n_topk))
  (gathered, (there,)), (compared, (back,)) = (
      (found, pull(cotangent_TK)) for found, pull in (
          jax.vjp(lambda score_TE, way=way: way(score_TE, expert_TK), score_TE)
          for way in (router.gathered, router.compared)))
  np.testing.assert_array_equal(gathered, compared)
  np.testing.assert_array_equal(there, back)


def sigmoid_by_hand(logit_TE, bias_E, n_topk, norm):
  """Token by token in float64: experts, weights, and each weight's gradient by its logits."""
  logit_TE, bias_E = np.float64(logit_TE), np.float64(bias_E)
  for logit_E in logit_TE:
    score_E = 1 / (1 + np.exp(-logit_E))
    slope_E = score_E * (1 - score_E)
    chosen = np.argsort(-(score_E + bias_E), kind="stable")[:n_topk]
    total = score_E[chosen].sum() if norm else 1.0
    gradient_KE = np.zeros((n_topk, len(logit_E)))
    for k, e in enumerate(chosen):
      gradient_KE[k, e] += slope_E[e] / total
      for other in chosen if norm else ():
        gradient_KE[k, other] -= score_E[e] * slope_E[other] / total**2
    yield chosen, score_E[chosen] / total, gradient_KE


@pytest.mark.parametrize("norm", [True, False])
@hypothesis.given(seed=st.integers(0, 2**31 - 1), shape=st.sampled_from([(7, 3), (4, 1), (5, 5)]))
@hypothesis.settings(max_examples=20, deadline=None)
def test_sigmoid_routing_is_the_formula_forward_and_backward(norm, seed, shape):
  n_exp, n_topk = shape
  rng = np.random.default_rng(seed)
  logit_TE = jnp.asarray(rng.normal(size=(6, n_exp)) * 2, jnp.float32)
  bias_E = jnp.asarray(rng.normal(size=n_exp) / 4, jnp.float32)
  factor_TK = rng.normal(size=(6, n_topk))

  def weighed(logit_TE, bias_E):
    routing = router.sigmoid_top_k(logit_TE, bias_E, n_topk, norm)
    return (routing.weight_TK * factor_TK).sum(), routing

  (logit_grad_TE, bias_grad_E), routing = jax.grad(weighed, (0, 1), has_aux=True)(logit_TE, bias_E)
  for t, (chosen, weight_K, gradient_KE) in enumerate(
      sigmoid_by_hand(logit_TE, bias_E, n_topk, norm)):
    np.testing.assert_array_equal(routing.expert_TK[t], chosen)
    np.testing.assert_allclose(routing.weight_TK[t], weight_K, rtol=1e-5)
    np.testing.assert_allclose(logit_grad_TE[t], factor_TK[t] @ gradient_KE, rtol=1e-4, atol=1e-6)
  np.testing.assert_array_equal(bias_grad_E, 0)
  np.testing.assert_allclose(routing.prob_TE.sum(1), 1, rtol=1e-5)


@pytest.mark.parametrize("norm", [True, False])
def test_scores_that_are_all_zero_in_float32_are_no_nan(norm):
  """A softmax keeps its largest; sigmoids of logits far below zero are 0, all of them."""
  def total(logit_TE):
    routing = router.sigmoid_top_k(logit_TE, jnp.zeros(4), 2, norm)
    return routing.weight_TK.sum() + (routing.prob_TE**2).sum()

  value, grad_TE = jax.value_and_grad(total)(jnp.full((3, 4), -120.0))
  assert value == 0 and jnp.isfinite(grad_TE).all()


def test_the_bias_decides_who_is_chosen_and_not_the_weights():
  logit_TE = jnp.array([[2.0, 1.0, 0.0, -3.0]])
  routing = router.sigmoid_top_k(logit_TE, jnp.array([0.0, 0.0, 0.0, 5.0]), 2, True)
  np.testing.assert_array_equal(routing.expert_TK, [[3, 0]])
  score = 1 / (1 + np.exp([3.0, -2.0]))
  np.testing.assert_allclose(routing.weight_TK[0], score / score.sum(), rtol=1e-6)


@hypothesis.given(load_LE=st.lists(st.lists(st.integers(0, 50), min_size=4, max_size=4),
                                   min_size=2, max_size=2))
@hypothesis.settings(deadline=None)
def test_the_bias_moves_by_the_rate_against_the_load(load_LE):
  load_LE = np.array(load_LE, np.float32)
  before_LE = np.linspace(-1, 1, 8, dtype=np.float32).reshape(2, 4)
  after_LE = router.balanced_bias(before_LE, load_LE, 0.25)
  for layer, (mean, loads) in enumerate(zip(load_LE.mean(1), load_LE, strict=True)):
    for e, load in enumerate(loads):
      step = -0.25 if load > mean else 0.25 if load < mean else 0.0
      np.testing.assert_allclose(after_LE[layer, e], before_LE[layer, e] + step, rtol=1e-6)


def test_the_bias_balances_a_router_that_prefers_some_experts():
  keys = jax.random.split(jax.random.key(0), 2)
  logit_TE = jax.random.normal(keys[0], (512, 8)) + 2 * jax.random.normal(keys[1], (8,))

  def step(bias_E, _):
    routing = router.sigmoid_top_k(logit_TE, bias_E, 2, True)
    sums = router.router_sums(routing, jnp.zeros(512, jnp.int32))
    metrics = router.router_metrics(sums)
    return router.balanced_bias(bias_E, sums.assigned_E, 0.002), metrics["load_variation"]

  _, variation = jax.lax.scan(step, jnp.zeros(8), length=300)
  assert variation[0] > 1
  assert variation[-10:].max() < 0.1  # steps of a fixed size go to and fro about the balance


def test_dead_experts_and_tokens_left_behind_are_counted():
  prob_TE = np.full((4, 4), 0.25)
  routing = router.Routing(jnp.array([[0, 1]] * 4), jnp.ones((4, 2)), jnp.asarray(prob_TE),
                           jnp.zeros((4, 4)))
  metrics = router.router_metrics(router.router_sums(routing, jnp.array([0, 1, 2, 2])))
  assert (metrics["dead_experts"], metrics["left_behind"]) == (0.5, 0.5)
  np.testing.assert_allclose(metrics["drop_rate"], 5 / 8)


def test_jitter_is_uniform_noise_of_each_row_for_itself():
  keys = jax.random.split(jax.random.key(0), 4)
  noise_BSD = router.jitter_noise(keys, 32, 16, 0.1)
  assert noise_BSD.shape == (4, 32, 16) and noise_BSD.dtype == jnp.float32
  assert 0.9 <= noise_BSD.min() < 0.905 and 1.095 < noise_BSD.max() <= 1.1
  np.testing.assert_allclose(noise_BSD.mean(), 1, atol=5 * 0.1 / np.sqrt(3 * noise_BSD.size))
  np.testing.assert_array_equal(router.jitter_noise(keys[2:3], 32, 16, 0.1)[0], noise_BSD[2])
  assert not np.array_equal(noise_BSD[0], noise_BSD[1])


def test_one_expert_without_normalization_has_weight_one():
  np.testing.assert_array_equal(routed(n_exp=1, n_topk=1, norm=False).weight_TK, 1)


def test_routing_is_float32_from_bfloat16_tokens():
  x_TD = jax.random.normal(jax.random.key(0), (4, 8), jnp.bfloat16)
  routing = router.route(x_TD, jnp.ones((8, 3), jnp.float32), 2, True)
  assert routing.logit_TE.dtype == routing.prob_TE.dtype == routing.weight_TK.dtype
  assert routing.weight_TK.dtype == jnp.float32
  np.testing.assert_allclose(routing.logit_TE[:, 0], np.float32(x_TD).sum(1), rtol=1e-6)


def sums_of(prob_TE, expert_TK):
  prob_TE, expert_TK = jnp.asarray(prob_TE), jnp.asarray(expert_TK)
  routing = router.Routing(expert_TK, jnp.ones(expert_TK.shape), prob_TE, jnp.log(prob_TE))
  return router.router_sums(routing, jnp.zeros(len(prob_TE), jnp.int32))


def test_balance_loss_is_one_when_balanced_and_n_exp_over_k_when_collapsed():
  uniform_TE = np.full((8, 4), 0.25)
  balanced = np.array([[0, 1], [2, 3]] * 4)
  np.testing.assert_allclose(router.balance_loss(sums_of(uniform_TE, balanced)), 1.0)
  collapsed_TE = np.array([[1 - 3e-6, 1e-6, 1e-6, 1e-6]] * 8)
  one = router.balance_loss(sums_of(collapsed_TE, np.zeros((8, 1), int)))
  np.testing.assert_allclose(one, 4.0, rtol=1e-4)


def test_balance_loss_is_of_the_global_batch():
  """Two halves that are each collapsed onto another expert balance each other."""
  left = sums_of(np.array([[0.98, 0.02]] * 8), np.zeros((8, 1), int))
  right = sums_of(np.array([[0.02, 0.98]] * 8), np.ones((8, 1), int))
  both = jax.tree.map(jnp.add, left, right)
  np.testing.assert_allclose(router.balance_loss(both), 1.0, rtol=1e-6)
  assert router.balance_loss(left) > 1.9


def test_z_loss_and_entropy_by_hand():
  logit_TE = np.array([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]])
  prob_TE = np.exp(logit_TE) / np.exp(logit_TE).sum(1, keepdims=True)
  routing = router.Routing(jnp.array([[2], [0]]), jnp.ones((2, 1)), jnp.asarray(prob_TE),
                           jnp.asarray(logit_TE))
  sums = router.router_sums(routing, jnp.array([0, 1]))
  lse_T = np.log(np.exp(logit_TE).sum(1))
  np.testing.assert_allclose(router.z_loss(sums), (lse_T**2).mean(), rtol=1e-6)
  metrics = router.router_metrics(sums)
  np.testing.assert_allclose(metrics["router_entropy"],
                             -(prob_TE * np.log(prob_TE)).sum(1).mean(), rtol=1e-5)
  np.testing.assert_allclose(metrics["drop_rate"], 0.5)
  np.testing.assert_allclose(metrics["max_load"], 1.5)
  np.testing.assert_allclose(metrics["load_variation"], np.std([1.5, 0, 1.5]), rtol=1e-6)


def test_padding_is_in_no_sum():
  routing = routed(n_tokens=12)
  dropped_T = jnp.arange(12) % 3
  counted_T = jnp.arange(12) % 4 != 1
  ours = router.router_sums(routing, dropped_T, counted_T)
  kept = router.Routing(*(x[np.asarray(counted_T)] for x in routing))
  theirs = router.router_sums(kept, dropped_T[np.asarray(counted_T)])
  assert ours.tokens == 9
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), ours, theirs)


def test_router_gets_gradient_through_the_weights_unless_top_one_is_normalized():
  x_TD = jax.random.normal(jax.random.key(0), (16, 8))
  w_router_DE = jax.random.normal(jax.random.key(1), (8, 4))

  def weights(w_router_DE, n_topk, norm):
    return (router.route(x_TD, w_router_DE, n_topk, norm).weight_TK[:, 0] ** 2).sum()

  starved = jax.grad(weights)(w_router_DE, 1, True)
  np.testing.assert_allclose(starved, 0, atol=1e-6)  # why the configuration refuses it
  assert np.abs(jax.grad(weights)(w_router_DE, 1, False)).max() > 1e-2
  assert np.abs(jax.grad(weights)(w_router_DE, 2, True)).max() > 1e-2


def test_tokens_are_not_kept_in_float32():
  x_TD, w_router_DE = jnp.ones((16, 8), jnp.bfloat16), jnp.ones((8, 4))
  _, vjp = jax.vjp(router.router_logits, x_TD, w_router_DE)
  assert {str(kept.dtype) for kept in jax.tree.leaves(vjp) if kept.shape == x_TD.shape} == {
      "bfloat16"}
