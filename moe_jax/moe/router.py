"""Token-choice top-k routing, its losses and its statistics, in float32.

The math is Qwen3-MoE's: softmax over all experts, top-k, weights divided by their sum; or
DeepSeek-V3's: sigmoid scores, and a bias on the selection that balances without a loss.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

# Name of routing decisions (experts of tokens, slots), which every remat policy saves: they are
# a few integers a token, and computing them again would take sorts.
SAVED = "route"

# Added to denominators: where all sigmoid scores of a token underflow, its weights are 0 and not
# NaN. Its square, by which the gradient divides, is still a number in float32.
_NO_SCORE = 1e-15


class Routing(NamedTuple):
  """Where each token goes.

  Attributes:
    expert_TK: int32, the chosen experts, best first.
    weight_TK: float32, what their outputs are multiplied by.
    prob_TE: float32, the scores of all experts divided by their sum.
    logit_TE: float32.
  """

  expert_TK: jax.Array
  weight_TK: jax.Array
  prob_TE: jax.Array
  logit_TE: jax.Array


class RouterSums(NamedTuple):
  """Sums over tokens, from which losses and metrics follow.

  They add up over routing groups, devices and microbatches, so that the balance loss is
  that of the global batch however it was split. (A mean of per-device balance losses is
  another loss: it asks each device's tokens to be balanced; see arXiv 2501.11873.)

  Attributes:
    assigned_E: assignments to each expert, dropped ones included.
    prob_E: sum of router probabilities.
    squared_lse: sum of squared log-sum-exp of the logits.
    entropy: sum of the entropies of the router's distributions, in nats.
    dropped: assignments that found no slot.
    left_behind: tokens that no expert served.
    tokens: how many tokens.
  """

  assigned_E: jax.Array
  prob_E: jax.Array
  squared_lse: jax.Array
  entropy: jax.Array
  dropped: jax.Array
  left_behind: jax.Array
  tokens: jax.Array


def route(x_TD: jax.Array, w_router_DE: jax.Array, n_topk: int, norm_topk_prob: bool,
          bias_E: jax.Array | None = None) -> Routing:
  """Chooses `n_topk` experts for each token.

  Args:
    x_TD: tokens, any float type.
    w_router_DE: router weights.
    n_topk: experts a token.
    norm_topk_prob: divide the chosen scores by their sum.
    bias_E: selection bias of sigmoid scores; None for a softmax.
  """
  logit_TE = router_logits(x_TD, w_router_DE)
  if bias_E is None:
    return softmax_top_k(logit_TE, n_topk, norm_topk_prob)
  return sigmoid_top_k(logit_TE, bias_E, n_topk, norm_topk_prob)


def jitter_noise(key_B: jax.Array, seq_len: int, d_model: int, jitter: float) -> jax.Array:
  """noise_BSD, uniform in 1 +- jitter: what the router's inputs are multiplied by in training.

  So that a token near a boundary is sent to either side now and then (input jitter of Switch,
  arXiv 2101.03961, appendix C). Each row has its own key, so that a row's noise is the same
  on whatever device and in whatever microbatch it is. The experts see the tokens as they are.
  """

  def draw(key):
    return jax.random.uniform(key, (seq_len, d_model), jnp.float32, 1 - jitter, 1 + jitter)

  return jax.vmap(draw)(key_B)


@functools.partial(jax.checkpoint, prevent_cse=False)
def router_logits(x_TD: jax.Array, w_router_DE: jax.Array) -> jax.Array:
  """logit_TE in float32, whatever the type of the tokens.

  Its backward pass converts the tokens again rather than keeping them in float32.
  """
  return jnp.einsum("td,de->te", x_TD.astype(jnp.float32), w_router_DE.astype(jnp.float32),
                    precision=jax.lax.Precision.HIGHEST)


def softmax_top_k(logit_TE: jax.Array, n_topk: int, norm_topk_prob: bool) -> Routing:
  """The most probable experts, weighted by their probabilities (Qwen3-MoE)."""
  prob_TE = jax.nn.softmax(logit_TE)
  expert_TK = _highest(prob_TE, n_topk)
  weight_TK = of_chosen(prob_TE, expert_TK)
  if norm_topk_prob:
    weight_TK /= weight_TK.sum(-1, keepdims=True)
  return Routing(expert_TK, weight_TK, prob_TE, logit_TE)


def sigmoid_top_k(logit_TE: jax.Array, bias_E: jax.Array, n_topk: int,
                  norm_topk_prob: bool) -> Routing:
  """The highest of sigmoid(logit) + bias, weighted by sigmoid(logit).

  The bias decides who is chosen and nothing else, so that balancing sends no gradient
  (DeepSeek-V3, arXiv 2412.19437, eq. 13-16; Wang et al., arXiv 2408.15664, eq. 3). `bias_E`
  moves by `balanced_bias`.
  """
  score_TE = jax.nn.sigmoid(logit_TE)
  expert_TK = _highest(score_TE + bias_E, n_topk)
  weight_TK = of_chosen(score_TE, expert_TK)
  if norm_topk_prob:
    weight_TK /= weight_TK.sum(-1, keepdims=True) + _NO_SCORE
  prob_TE = score_TE / (score_TE.sum(-1, keepdims=True) + _NO_SCORE)
  return Routing(expert_TK, weight_TK, prob_TE, logit_TE)


def _highest(score_TE: jax.Array, n_topk: int) -> jax.Array:
  """expert_TK, best first."""
  _, expert_TK = jax.lax.top_k(jax.lax.stop_gradient(score_TE), n_topk)
  return checkpoint_name(expert_TK, SAVED)


def of_chosen(score_TE: jax.Array, expert_TK: jax.Array) -> jax.Array:
  """score_TK of the chosen experts, each chosen once."""
  return jax.lax.platform_dependent(score_TE, expert_TK, cpu=gathered, default=compared)


def gathered(score_TE: jax.Array, expert_TK: jax.Array) -> jax.Array:
  """score_TK by take_along_axis, whose gradient is a scatter: fast on CPUs."""
  return jnp.take_along_axis(score_TE, expert_TK, axis=-1)


@jax.custom_vjp
def compared(score_TE: jax.Array, expert_TK: jax.Array) -> jax.Array:
  """score_TK by comparing with every expert, forward and backward: fast on vector units.

  A TPU gathers numbers one by one, and sorts what it scatters. There the T*K*E comparisons, which
  grow with the square of granularity, are part of the sum that they go into. A CPU makes them one
  after another: with 512 experts, 64 a token, they took 700 times as long as the gather.
  """
  return jnp.where(_is_chosen(score_TE, expert_TK), score_TE[:, None], 0).sum(-1)


def _compared_fwd(score_TE, expert_TK):
  return compared(score_TE, expert_TK), (score_TE, expert_TK)


def _compared_bwd(residuals, dscore_TK):
  chosen_TKE = _is_chosen(*residuals)
  return jnp.where(chosen_TKE, dscore_TK[..., None], 0).sum(1), None


compared.defvjp(_compared_fwd, _compared_bwd)


def _is_chosen(score_TE, expert_TK):
  return expert_TK[..., None] == jnp.arange(score_TE.shape[-1])


def balanced_bias(bias_E: jax.Array, assigned_E: jax.Array, rate: float) -> jax.Array:
  """The selection bias for the next step: b_e + rate * sign(mean load - load_e).

  An overloaded expert is chosen less from now on, by a fixed amount (arXiv 2408.15664,
  algorithm 1). The loads are those of the global batch. Leading axes (layers) are kept.
  """
  excess_E = assigned_E - assigned_E.mean(-1, keepdims=True)
  return bias_E - rate * jnp.sign(excess_E)


def router_sums(routing: Routing, dropped_T: jax.Array,
                counted_T: jax.Array | None = None) -> RouterSums:
  """Sums over tokens.

  Args:
    routing: where they go.
    dropped_T: assignments of each token that found no slot.
    counted_T: bool, False for padding, which no sum counts; None counts every token.
  """
  n_tokens, n_exp = routing.prob_TE.shape
  if counted_T is None:
    counted_T = jnp.ones(n_tokens, bool)
  # Padding goes to an expert past the last, which bincount leaves out.
  expert_TK = jnp.where(counted_T[:, None], routing.expert_TK, n_exp)
  return sums_over_tokens(routing.prob_TE, routing.logit_TE,
                          assigned_E=jnp.bincount(expert_TK.ravel(), length=n_exp),
                          dropped_T=dropped_T, left_behind_T=dropped_T == expert_TK.shape[1],
                          counted_T=counted_T)


def sums_over_tokens(prob_TE: jax.Array, logit_TE: jax.Array, *, assigned_E: jax.Array,
                     dropped_T: jax.Array, left_behind_T: jax.Array,
                     counted_T: jax.Array) -> RouterSums:
  """RouterSums of the tokens that count.

  Args:
    prob_TE, logit_TE: float32, the router's scores.
    assigned_E: assignments to each expert, of counted tokens alone.
    dropped_T: assignments of each token that found no slot.
    left_behind_T: bool, whether no expert served it.
    counted_T: bool, False for padding.
  """
  lse_T = jax.nn.logsumexp(logit_TE, axis=-1)
  # No loss: and the derivative at a probability of 0 would be infinite.
  entropy_T = jax.scipy.special.entr(jax.lax.stop_gradient(prob_TE)).sum(-1)
  return RouterSums(
      assigned_E=assigned_E.astype(jnp.float32),
      prob_E=jnp.where(counted_T[:, None], prob_TE, 0).sum(0),
      squared_lse=jnp.where(counted_T, lse_T**2, 0).sum(),
      entropy=jnp.where(counted_T, entropy_T, 0).sum(),
      dropped=jnp.where(counted_T, dropped_T, 0).sum().astype(jnp.float32),
      left_behind=(counted_T & left_behind_T).sum().astype(jnp.float32),
      tokens=counted_T.sum().astype(jnp.float32))


def balance_loss(sums: RouterSums) -> jax.Array:
  """E * sum_e f_e P_e, which is 1 at perfect balance (Switch, arXiv 2101.03961, eq. 4).

  f_e is the share of assignments, P_e the mean probability. f is a count and carries no
  gradient. Leading axes (layers) are kept.
  """
  n_exp = sums.assigned_E.shape[-1]
  f_E = sums.assigned_E / sums.assigned_E.sum(-1, keepdims=True)
  p_E = sums.prob_E / sums.tokens[..., None]
  return n_exp * (f_E * p_E).sum(-1)


def z_loss(sums: RouterSums) -> jax.Array:
  """Mean squared log-sum-exp of the logits (ST-MoE, arXiv 2202.08906, eq. 5)."""
  return sums.squared_lse / sums.tokens


def router_metrics(sums: RouterSums) -> dict[str, jax.Array]:
  """Plain numbers to log, over layers where the sums have them.

  drop_rate: share of assignments without a slot. left_behind: share of tokens that no expert
  served. load_variation: standard deviation of expert loads over their mean, worst layer.
  max_load: busiest expert's load over the mean, worst layer. dead_experts: share of experts that
  no token chose. router_entropy: nats, mean.
  """
  load_E = sums.assigned_E / sums.assigned_E.mean(-1, keepdims=True)
  return {
      "drop_rate": sums.dropped.sum() / sums.assigned_E.sum(),
      "left_behind": sums.left_behind.sum() / sums.tokens.sum(),
      "load_variation": load_E.std(-1).max(),
      "max_load": load_E.max(),
      "dead_experts": (load_E == 0).mean(),
      "router_entropy": (sums.entropy / sums.tokens).mean(),
  }
