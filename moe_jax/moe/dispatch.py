"""Dispatch: send each token to its experts and bring the weighted outputs back.

Several implementations, one truth:

    dispatch(x_TD, routing, run_experts) -> (y_TD, dropped_T)

`run_experts(x_ERD, weight_ER=None)` maps rows, R for each expert, to outputs of the same shape,
times the weight of each row where there are weights; it knows the experts and where they live
(see layer.py). Where experts have unequal numbers of rows (dropless.py), it is
`run_groups(x_SD, weight_S, size_E)`, on the rows of one expert after another. `dropped_T` counts
each token's assignments that found no slot. Everything is index-based: no [T, E, C] tensor exists,
so the cost of dispatch follows the rows that move, T*K*D, and not the number of experts.
"""

import fractions
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe_jax.moe.router import SAVED, Routing

RunExperts = Callable[..., jax.Array]


def expert_capacity(capacity_factor: float, group_tokens: int, n_topk: int,
                    n_exp: int) -> int:
  """Slots per expert and routing group: ceil(factor * tokens * n_topk / n_exp).

  At most `group_tokens`, for a token goes to an expert once. The factor counts as the decimal
  number that was written: 1.1 * 10 is 11 slots, not the 12 of binary rounding.
  """
  slots = fractions.Fraction(str(capacity_factor)) * group_tokens * n_topk / n_exp
  return min(math.ceil(slots), group_tokens)


def reference_dispatch(x_TD: jax.Array, routing: Routing,
                       run_experts: RunExperts) -> tuple[jax.Array, jax.Array]:
  """Every expert on every token, in float32: slow and obviously right. Drops nothing."""
  n_tokens, n_exp = routing.prob_TE.shape
  weight_TE = (jax.nn.one_hot(routing.expert_TK, n_exp) * routing.weight_TK[..., None]).sum(1)
  return run_every_expert(x_TD, weight_TE, run_experts), jnp.zeros(n_tokens, jnp.int32)


def run_every_expert(x_TD: jax.Array, weight_TE: jax.Array,
                     run_experts: RunExperts) -> jax.Array:
  """y_TD: the outputs of all experts for each token, by weight, in float32."""
  x_ETD = jnp.broadcast_to(x_TD.astype(jnp.float32), (weight_TE.shape[1], *x_TD.shape))
  y_TD = jnp.einsum("te,etd->td", weight_TE, run_experts(x_ETD),
                    precision=jax.lax.Precision.HIGHEST)
  return y_TD.astype(x_TD.dtype)


def capacity_dispatch(x_TD: jax.Array, routing: Routing, run_experts: RunExperts, *,
                      group_tokens: int, capacity: int,
                      priority_TK: jax.Array | None = None,
                      n_devices: int = 1) -> tuple[jax.Array, jax.Array]:
  """A fixed number of slots for each expert and routing group; what overflows is dropped.

  A dropped assignment contributes nothing to its token; the other weights stay as they are.

  Args:
    x_TD: tokens; T must be a multiple of `group_tokens`.
    routing: where they go.
    run_experts: (x_ERD, weight_ER) -> y_ERD with R = groups * capacity. Rows of empty slots
      weigh nothing.
    group_tokens: N, consecutive tokens that compete for the same slots.
    capacity: C, slots per expert and group.
    priority_TK: who is served first at an expert; None means earlier positions.
    n_devices: over how many the experts lie, in equal parts. Rows come with the first expert of
      each device, then the second of each, and so on: so that they travel without being
      put in another order first.

  Returns:
    y_TD, and dropped_T: int32, assignments of each token that found no slot.
  """
  n_exp, d_model = routing.prob_TE.shape[-1], x_TD.shape[-1]
  expert_TK = routing.expert_TK
  if n_devices > 1:
    n_here = n_exp // n_devices
    expert_TK = expert_TK % n_here * n_devices + expert_TK // n_here
  with jax.named_scope("dispatch"):
    slots = assign_slots(expert_TK, n_exp, group_tokens, capacity, priority_TK)
    x_ERD = gather_rows(x_TD, slots).reshape(n_exp, -1, d_model)
    weight_ER = gather_weights(routing.weight_TK, slots).reshape(x_ERD.shape[:2])
  y_SD = run_experts(x_ERD, weight_ER).reshape(-1, d_model)
  with jax.named_scope("combine"):
    return sum_rows(y_SD, slots), (slots.slot_KT == y_SD.shape[0]).sum(0)


class Slots(NamedTuple):
  """A partial one-to-one map between assignments (choice, token) and slots, both ways.

  Slots are numbered expert first, so that those of an expert lie together: here S = E*G*C, and
  without a capacity as dropless.py has them.
  Assignments are numbered choice first, k*T + t: with the few choices innermost a TPU would fill
  few of its lanes, and put every array of them in another order before using it.

  Attributes:
    assignment_S: index into the flattened K*T assignments; K*T for an empty slot.
    slot_KT: the slot of each assignment; S for a dropped one.
  """

  assignment_S: jax.Array
  slot_KT: jax.Array


def assign_slots(expert_TK: jax.Array, n_exp: int, group_tokens: int, capacity: int,
                 priority_TK: jax.Array | None = None) -> Slots:
  """Gives each assignment a slot of its expert, earlier positions of a group first.

  With priorities the highest come first, and position decides between equal ones. V-MoE's
  batch-prioritized routing (arXiv 2106.05974, section 4.1) is the same for n_topk = 1; above,
  it ranks tokens by their largest weight and serves all first choices before second ones,
  where here each expert ranks what was assigned to it.

  Args:
    expert_TK: int32, the experts of each token; T must be whole groups.
    n_exp: E, how many experts there are.
    group_tokens, capacity, priority_TK: see capacity_dispatch.
  """
  n_tokens, n_topk = expert_TK.shape
  n_groups, remainder = divmod(n_tokens, group_tokens)
  assert remainder == 0, f"{n_tokens} tokens are not whole groups of {group_tokens}"
  group_size = group_tokens * n_topk  # assignments in a group, position-major
  n_slots = n_exp * n_groups * capacity

  expert_GNK = expert_TK.reshape(n_groups, group_tokens, n_topk)
  if priority_TK is None:
    order_GA, sorted_GA = sort_by_expert(expert_GNK, n_exp)
  else:
    expert_GA = expert_GNK.reshape(n_groups, group_size)
    order_GA = jnp.lexsort((-priority_TK.reshape(n_groups, group_size), expert_GA), axis=-1)
    sorted_GA = jnp.take_along_axis(expert_GA, order_GA, axis=-1)
  bounds = jax.vmap(lambda row: jnp.searchsorted(row, jnp.arange(n_exp + 1)))(sorted_GA)
  start_GE, end_GE = bounds[:, :-1], bounds[:, 1:]

  # Slot -> assignment: the c-th assignment of expert e stands at start + c in sorted order.
  source_GEC = start_GE[..., None] + jnp.arange(capacity)
  order_GEC = jnp.take_along_axis(
      order_GA, source_GEC.reshape(n_groups, -1), axis=-1, mode="clip").reshape(source_GEC.shape)
  assignment_GEC = jnp.where(
      source_GEC < end_GE[..., None],
      choice_first(order_GEC, n_topk, n_tokens)
      + group_tokens * jnp.arange(n_groups)[:, None, None], n_tokens * n_topk)

  # Assignment -> slot: the inverse.
  rank_GA = jnp.arange(group_size) - jnp.take_along_axis(start_GE, sorted_GA, axis=-1)
  first_slot_GA = (sorted_GA * n_groups + jnp.arange(n_groups)[:, None]) * capacity
  slot_GA = jnp.where(rank_GA < capacity, first_slot_GA + rank_GA, n_slots)
  return Slots(*checkpoint_name((assignment_GEC.swapaxes(0, 1).ravel(),
                                 unsorted(slot_GA, order_GA, n_topk)), SAVED))


def sort_by_expert(expert_GNK: jax.Array, n_exp: int) -> tuple[jax.Array, jax.Array]:
  """The assignments of each group by expert, then by position, A = N*K.

  Expert and position are sorted as one number where 31 bits hold both: a sort of one array costs
  half of one of pairs, to run and, on a TPU, to compile. The numbers are laid out choice by
  choice, since K alone would leave a TPU's lanes empty.

  Returns:
    order_GA: n * K + k of each, and sorted_GA: its expert.
  """
  *groups, n_tokens, n_topk = expert_GNK.shape
  n_assigned = n_tokens * n_topk
  if n_exp * n_assigned >= 2**31:
    expert_GA = expert_GNK.reshape(*groups, n_assigned)
    order_GA = jnp.argsort(expert_GA, axis=-1, stable=True)
    return order_GA, jnp.take_along_axis(expert_GA, order_GA, axis=-1)
  number_KN = jnp.arange(n_topk)[:, None] + n_topk * jnp.arange(n_tokens)
  both_GKN = expert_GNK.swapaxes(-1, -2) * n_assigned + number_KN
  both_GA = jnp.sort(both_GKN.reshape(*groups, n_assigned), axis=-1)
  return both_GA % n_assigned, both_GA // n_assigned


def choice_first(order: jax.Array, n_topk: int, n_tokens: int) -> jax.Array:
  """The assignments n * K + k of `sort_by_expert` as k * n_tokens + n."""
  return order % n_topk * n_tokens + order // n_topk


def unsorted(value_GA: jax.Array, order_GA: jax.Array, n_topk: int) -> jax.Array:
  """value_KT: what `sort_by_expert` put in order, back where it came from; T = G*N."""
  n_groups, n_assigned = order_GA.shape
  n_tokens = n_assigned // n_topk
  place_GA = choice_first(order_GA, n_topk, n_tokens)
  value_GA = jnp.zeros_like(value_GA).at[jnp.arange(n_groups)[:, None], place_GA].set(
      value_GA, unique_indices=True)
  return value_GA.reshape(n_groups, n_topk, n_tokens).swapaxes(0, 1).reshape(n_topk, -1)


# Moving rows. The map between assignments and slots is one-to-one and stored both ways, so the
# gradient of a gather is again a gather, where automatic differentiation would emit a
# scatter-add. An empty slot gets the row of token 0 (its assignment is K*T, a multiple of T), which
# costs less than zeros would: its weight is 0, and so is all that comes of it, forward and
# backward, while numbers are finite.


def _gather_rows(x_TD, slots):
  token_S = slots.assignment_S % x_TD.shape[0]
  return x_TD.at[token_S].get(mode="promise_in_bounds")


def _sum_rows(y_SD, slots):
  # One choice after the other: its rows are added as they are read, where a gather of all choices
  # would write K*T rows to memory first.
  def rows(slot_T):
    kept_T1 = (slot_T < y_SD.shape[0])[:, None]
    return jnp.where(kept_T1, y_SD.at[slot_T].get(mode="clip"), 0).astype(jnp.float32)

  return sum(map(rows, slots.slot_KT)).astype(y_SD.dtype)


def _gather_weights(weight_TK, slots):
  return _or_zero(weight_TK.T.ravel(), slots.assignment_S)


def _weights_back(weight_S, slots):
  return _or_zero(weight_S, slots.slot_KT).T


def _or_zero(values, index):
  """values[index], and 0 where the index is one past the end."""
  return values.at[index].get(mode="fill", fill_value=0)


def _with_transpose(linear, transpose, doc: str):
  """linear(x, slots), whose gradient is transpose(dy, slots)."""
  function = jax.custom_vjp(linear)
  function.defvjp(lambda x, slots: (linear(x, slots), slots),
                  lambda slots, dy: (transpose(dy, slots), None))
  function.__doc__ = doc
  return function


gather_rows = _with_transpose(
    _gather_rows, _sum_rows, "x_TD -> x_SD: the token of each slot; in empty slots some token's.")
sum_rows = _with_transpose(
    _sum_rows, _gather_rows, "y_SD -> y_TD: the sum over each token's slots, in float32.")
gather_weights = _with_transpose(
    _gather_weights, _weights_back,
    "weight_TK -> weight_S: of the assignment in each slot, 0 in empty slots.")
