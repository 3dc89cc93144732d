"""Token-choice top-k routing with its losses and statistics, in float32.

Two variants: Qwen3-MoE's (softmax over all experts, top-k, weights divided by their sum) and
DeepSeek-V3's (sigmoid scores, and a selection bias that balances load without a loss).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

# checkpoint_name of routing decisions (experts and slots), which every remat policy saves: they are
# a few integers per token, and recomputing them would repeat the sorts.
SAVED = "route"

# Added to denominators, so that a token whose sigmoid scores all underflow gets weights of 0, not
# NaN. Its square, by which the gradient divides, does not underflow in float32.
_NO_SCORE = 1e-15


class Routing(NamedTuple):
  """Where each token goes.

  Attributes:
    expert_TK: int32, the chosen experts, best first.
    weight_TK: float32, the weights of their outputs.
    prob_TE: float32, the scores of all experts divided by their sum.
    logit_TE: float32.
  """

  expert_TK: jax.Array
  weight_TK: jax.Array
  prob_TE: jax.Array
  logit_TE: jax.Array


class RouterSums(NamedTuple):
  """Sums over tokens, from which the router's losses and metrics are computed.

  They are additive over routing groups, devices and microbatches, so the balance loss is that of
  the global batch however it is split. (The mean of per-device balance losses is a different
  loss: it asks for each device's tokens to be balanced; see arXiv 2501.11873.)

  Attributes:
    assigned_E: assignments to each expert, dropped ones included.
    prob_E: sum of router probabilities.
    squared_lse: sum of squared log-sum-exp of the logits.
    entropy: sum of the entropies of the router's distributions, in nats.
    dropped: number of assignments that found no slot.
    left_behind: number of tokens that no expert served.
    tokens: number of tokens.
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
    n_topk: experts per token.
    norm_topk_prob: whether to divide the chosen scores by their sum.
    bias_E: selection bias for sigmoid scores; None for softmax.
  """
  logit_TE = router_logits(x_TD, w_router_DE)
  if bias_E is None:
    return softmax_top_k(logit_TE, n_topk, norm_topk_prob)
  return sigmoid_top_k(logit_TE, bias_E, n_topk, norm_topk_prob)


def jitter_noise(key_B: jax.Array, seq_len: int, d_model: int, jitter: float) -> jax.Array:
  """noise_BSD, uniform in 1 +- jitter, which multiplies the router's inputs in training.

  It lets a token near a decision boundary sometimes go to the other side (Switch's input jitter,
  arXiv 2101.03961, appendix C). Each row has its own key, so its noise does not depend on its
  device or microbatch. The experts see the tokens without noise.
  """

  def draw(key):
    return jax.random.uniform(key, (seq_len, d_model), jnp.float32, 1 - jitter, 1 + jitter)

  return jax.vmap(draw)(key_B)


@functools.partial(jax.checkpoint, prevent_cse=False)
def router_logits(x_TD: jax.Array, w_router_DE: jax.Array) -> jax.Array:
  """logit_TE, in float32 for tokens of any dtype.

  The backward pass recomputes the float32 copy of the tokens instead of saving it.
  """
  return jnp.einsum("td,de->te", x_TD.astype(jnp.float32), w_router_DE.astype(jnp.float32),
                    precision=jax.lax.Precision.HIGHEST)


def softmax_top_k(logit_TE: jax.Array, n_topk: int, norm_topk_prob: bool) -> Routing:
  """Chooses the most probable experts, weighted by their probabilities (Qwen3-MoE)."""
  prob_TE = jax.nn.softmax(logit_TE)
  expert_TK = _highest(prob_TE, n_topk)
  weight_TK = of_chosen(prob_TE, expert_TK)
  if norm_topk_prob:
    weight_TK /= weight_TK.sum(-1, keepdims=True)
  return Routing(expert_TK, weight_TK, prob_TE, logit_TE)


def sigmoid_top_k(logit_TE: jax.Array, bias_E: jax.Array, n_topk: int,
                  norm_topk_prob: bool) -> Routing:
  """Chooses experts by sigmoid(logit) + bias and weights them by sigmoid(logit).

  The bias affects only which experts are chosen, so balancing adds no gradient (DeepSeek-V3,
  arXiv 2412.19437, eq. 13-16; Wang et al., arXiv 2408.15664, eq. 3). `bias_E` is updated by
  `balanced_bias`.
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
  """score_TK: the scores of the chosen experts, which are distinct for each token."""
  return jax.lax.platform_dependent(score_TE, expert_TK, cpu=gathered, default=compared)


def gathered(score_TE: jax.Array, expert_TK: jax.Array) -> jax.Array:
  """`of_chosen` by take_along_axis, whose gradient is a scatter: fast on CPUs."""
  return jnp.take_along_axis(score_TE, expert_TK, axis=-1)


@jax.custom_vjp
def compared(score_TE: jax.Array, expert_TK: jax.Array) -> jax.Array:
  """`of_chosen` by comparing with every expert, forward and backward: fast on vector units.

  A TPU gathers elements one by one and sorts before it scatters. There the T*K*E comparisons, which
  grow with the square of granularity, fuse into the sum that follows. A CPU executes them one by
  one: with 512 experts, 64 per token, they took 700 times as long as the gather.
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
  """Returns the selection bias for the next step: b_e + rate * sign(mean load - load_e).

  The bias of an overloaded expert decreases by a fixed amount, so it is chosen less often
  (arXiv 2408.15664, algorithm 1). Loads are those of the global batch. Leading axes (layers) are
  kept.
  """
  excess_E = assigned_E - assigned_E.mean(-1, keepdims=True)
  return bias_E - rate * jnp.sign(excess_E)


def router_sums(routing: Routing, dropped_T: jax.Array,
                counted_T: jax.Array | None = None) -> RouterSums:
  """Sums the router's statistics over tokens.

  Args:
    routing: the experts and scores of each token.
    dropped_T: number of assignments of each token that found no slot.
    counted_T: bool, False for padding, which no sum counts; None counts every token.
  """
  n_tokens, n_exp = routing.prob_TE.shape
  if counted_T is None:
    counted_T = jnp.ones(n_tokens, bool)
  # Padding goes to a nonexistent expert, which bincount ignores.
  expert_TK = jnp.where(counted_T[:, None], routing.expert_TK, n_exp)
  return sums_over_tokens(routing.prob_TE, routing.logit_TE,
                          assigned_E=jnp.bincount(expert_TK.ravel(), length=n_exp),
                          dropped_T=dropped_T, left_behind_T=dropped_T == expert_TK.shape[1],
                          counted_T=counted_T)


def sums_over_tokens(prob_TE: jax.Array, logit_TE: jax.Array, *, assigned_E: jax.Array,
                     dropped_T: jax.Array, left_behind_T: jax.Array,
                     counted_T: jax.Array) -> RouterSums:
  """RouterSums over the counted tokens.

  Args:
    prob_TE, logit_TE: float32, the router's scores.
    assigned_E: assignments to each expert, from counted tokens only.
    dropped_T: number of assignments of each token that found no slot.
    left_behind_T: bool, True for tokens that no expert served.
    counted_T: bool, False for padding.
  """
  lse_T = jax.nn.logsumexp(logit_TE, axis=-1)
  # The entropy is a metric, not a loss, and its derivative at a probability of 0 is infinite.
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
  """Scalar metrics, aggregated over layers if the sums have a layer axis.

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
