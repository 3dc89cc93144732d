"""Expert choice: each expert picks its tokens (Zhou et al., arXiv 2202.09368). Research only.

Every expert takes the same number of tokens from a routing group, so loads are balanced by
construction and nothing overflows. A token is picked by n_topk experts on average, and possibly by
none. This is NOT causal: whether an expert picks a token depends on later tokens, so the measured
loss has seen the future, and the model cannot decode.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.moe.dispatch import RunExperts, run_every_expert
from moe_jax.moe.router import RouterSums, sums_over_tokens


class Choice(NamedTuple):
  """Which tokens the experts picked.

  Slots are numbered expert first, then routing group: S = E*G*C.

  Attributes:
    token_S: int32, the token in each slot.
    weight_S: float32, the weight of the expert's output for that token: its probability.
    prob_TE: float32, softmax over all experts.
    logit_TE: float32.
  """

  token_S: jax.Array
  weight_S: jax.Array
  prob_TE: jax.Array
  logit_TE: jax.Array

  @property
  def chosen_TE(self) -> jax.Array:
    """bool, whether expert e picked token t."""
    n_exp = self.prob_TE.shape[-1]
    expert_S = jnp.repeat(jnp.arange(n_exp), self.token_S.size // n_exp)
    return jnp.zeros(self.prob_TE.shape, bool).at[self.token_S, expert_S].set(True)


def choose_tokens(logit_TE: jax.Array, n_topk: int, group_tokens: int,
                  counted_T: jax.Array | None = None) -> Choice:
  """Each expert picks its group_tokens * n_topk / n_exp most probable tokens of each group.

  That number must be an integer. Ties go to the earlier token. Tokens that are not counted
  (padding) are picked last. (arXiv 2202.09368, section 3.1.)
  """
  n_tokens, n_exp = logit_TE.shape
  capacity = group_tokens * n_topk // n_exp
  n_groups = n_tokens // group_tokens
  prob_TE = jax.nn.softmax(logit_TE)
  rank_TE = jax.lax.stop_gradient(prob_TE)
  if counted_T is not None:
    rank_TE = jnp.where(counted_T[:, None], rank_TE, -1)
  rank_EGN = rank_TE.T.reshape(n_exp, n_groups, group_tokens)
  _, position_EGC = jax.lax.top_k(rank_EGN, capacity)
  token_EGC = position_EGC + group_tokens * jnp.arange(n_groups)[:, None]
  weight_ES = jnp.take_along_axis(prob_TE.T, token_EGC.reshape(n_exp, -1), axis=1)
  return Choice(token_EGC.ravel(), weight_ES.ravel(), prob_TE, logit_TE)


def choice_dispatch(x_TD: jax.Array, choice: Choice, run_experts: RunExperts) -> jax.Array:
  """y_TD: the weighted sum of the outputs of the experts that picked each token.

  `run_experts` maps x_ERD to y_ERD with R = groups * capacity. A token may be picked by any
  number of experts, so outputs are combined by a scatter-add, in float32.
  """
  n_exp, d_model = choice.prob_TE.shape[-1], x_TD.shape[-1]
  # Gathered from float32 for the sake of the backward pass, which is a scatter-add: a token's
  # gradient sums over the experts that picked it.
  x_SD = x_TD.astype(jnp.float32)[choice.token_S].astype(x_TD.dtype)
  y_ERD = run_experts(x_SD.reshape(n_exp, -1, d_model))
  y_SD = y_ERD.reshape(-1, d_model).astype(jnp.float32) * choice.weight_S[:, None]
  return jnp.zeros(x_TD.shape, jnp.float32).at[choice.token_S].add(y_SD).astype(x_TD.dtype)


def reference_choice_dispatch(x_TD: jax.Array, choice: Choice,
                              run_experts: RunExperts) -> jax.Array:
  """Runs every expert on every token, in float32: slow but obviously correct."""
  return run_every_expert(x_TD, choice.prob_TE * choice.chosen_TE, run_experts)


def choice_sums(choice: Choice, counted_T: jax.Array | None = None) -> RouterSums:
  """The router's sums. Nothing is dropped; tokens that no expert picked count as left behind."""
  chosen_TE = choice.chosen_TE
  if counted_T is None:
    counted_T = jnp.ones(len(chosen_TE), bool)
  return sums_over_tokens(
      choice.prob_TE, choice.logit_TE, assigned_E=(chosen_TE & counted_T[:, None]).sum(0),
      dropped_T=jnp.zeros_like(counted_T, jnp.int32), left_behind_T=~chosen_TE.any(-1),
      counted_T=counted_T)
