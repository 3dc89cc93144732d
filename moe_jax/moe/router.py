"""Token-choice top-k routing, its losses and its statistics, in float32.

The math is Qwen3-MoE's: softmax over all experts, top-k, weights divided by their sum.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Routing(NamedTuple):
  """Where each token goes.

  Attributes:
    expert_TK: int32, the chosen experts, best first.
    weight_TK: float32, what their outputs are multiplied by.
    prob_TE: float32, softmax over all experts.
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
    tokens: how many tokens.
  """

  assigned_E: jax.Array
  prob_E: jax.Array
  squared_lse: jax.Array
  entropy: jax.Array
  dropped: jax.Array
  tokens: jax.Array


def route(x_TD: jax.Array, w_router_DE: jax.Array, n_topk: int,
          norm_topk_prob: bool) -> Routing:
  """Chooses `n_topk` experts for each token.

  Args:
    x_TD: tokens, any float type.
    w_router_DE: router weights.
    n_topk: experts a token.
    norm_topk_prob: divide the chosen probabilities by their sum.
  """
  logit_TE = jnp.einsum("td,de->te", x_TD.astype(jnp.float32), w_router_DE.astype(jnp.float32),
                        precision=jax.lax.Precision.HIGHEST)
  prob_TE = jax.nn.softmax(logit_TE)
  weight_TK, expert_TK = jax.lax.top_k(prob_TE, n_topk)
  if norm_topk_prob:
    weight_TK /= weight_TK.sum(-1, keepdims=True)
  return Routing(expert_TK, weight_TK, prob_TE, logit_TE)


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
  lse_T = jax.nn.logsumexp(routing.logit_TE, axis=-1)
  # H = lse - sum_e p_e logit_e: no logarithm of a probability that may be 0.
  entropy_T = lse_T - (routing.prob_TE * routing.logit_TE).sum(-1)
  # Padding goes to an expert past the last, which bincount leaves out.
  expert_TK = jnp.where(counted_T[:, None], routing.expert_TK, n_exp)
  return RouterSums(
      assigned_E=jnp.bincount(expert_TK.ravel(), length=n_exp).astype(jnp.float32),
      prob_E=jnp.where(counted_T[:, None], routing.prob_TE, 0).sum(0),
      squared_lse=jnp.where(counted_T, lse_T**2, 0).sum(),
      entropy=jnp.where(counted_T, entropy_T, 0).sum(),
      dropped=jnp.where(counted_T, dropped_T, 0).sum().astype(jnp.float32),
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

  drop_rate: share of assignments without a slot. load_variation: standard deviation of
  expert loads over their mean, worst layer. max_load: busiest expert's load over the mean,
  worst layer. router_entropy: nats, mean.
  """
  load_E = sums.assigned_E / sums.assigned_E.mean(-1, keepdims=True)
  return {
      "drop_rate": sums.dropped.sum() / sums.assigned_E.sum(),
      "load_variation": load_E.std(-1).max(),
      "max_load": load_E.max(),
      "router_entropy": (sums.entropy / sums.tokens).mean(),
  }
