"""Dispatch: sends each token to its experts and sums their weighted outputs.

All implementations share one signature and are tested against `reference_dispatch`:

    dispatch(x_TD, routing, run_experts) -> (y_TD, dropped_T)

`run_experts(x_ERD, weight_ER=None)` maps R rows per expert to outputs of the same shape, scaled
by the row weights if given; it holds the experts' weights and knows which device each expert is on
(see layer.py). Where the number of rows varies by expert (dropless.py), its counterpart is
`run_groups(x_SD, weight_S, size_E)`, which takes rows sorted by expert. `dropped_T` counts
the assignments of each token that found no slot. Everything is index-based: no [T, E, C] tensor
is ever built, so the cost of dispatch scales with the rows moved, T*K*D, not with E.
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

  At most `group_tokens`, since a token goes to an expert at most once. The factor is taken as the
  decimal number written: 1.1 * 10 is 11 slots, not the 12 that binary rounding would give.
  """
  slots = fractions.Fraction(str(capacity_factor)) * group_tokens * n_topk / n_exp
  return min(math.ceil(slots), group_tokens)


def reference_dispatch(x_TD: jax.Array, routing: Routing,
                       run_experts: RunExperts) -> tuple[jax.Array, jax.Array]:
  """Runs every expert on every token, in float32: slow but obviously correct. Drops nothing."""
  n_tokens, n_exp = routing.prob_TE.shape
  weight_TE = (jax.nn.one_hot(routing.expert_TK, n_exp) * routing.weight_TK[..., None]).sum(1)
  return run_every_expert(x_TD, weight_TE, run_experts), jnp.zeros(n_tokens, jnp.int32)


def run_every_expert(x_TD: jax.Array, weight_TE: jax.Array,
                     run_experts: RunExperts) -> jax.Array:
  """y_TD: the weighted sum of all experts' outputs for each token, computed in float32."""
  x_ETD = jnp.broadcast_to(x_TD.astype(jnp.float32), (weight_TE.shape[1], *x_TD.shape))
  y_TD = jnp.einsum("te,etd->td", weight_TE, run_experts(x_ETD),
                    precision=jax.lax.Precision.HIGHEST)
  return y_TD.astype(x_TD.dtype)


def capacity_dispatch(x_TD: jax.Array, routing: Routing, run_experts: RunExperts, *,
                      group_tokens: int, capacity: int,
                      priority_TK: jax.Array | None = None,
                      n_devices: int = 1) -> tuple[jax.Array, jax.Array]:
  """Dispatches into a fixed number of slots per expert and routing group; drops the overflow.

  A dropped assignment contributes nothing to its token; the token's other weights are unchanged.

  Args:
    x_TD: tokens; T must be a multiple of `group_tokens`.
    routing: the experts and weights of each token.
    run_experts: (x_ERD, weight_ER) -> y_ERD with R = groups * capacity. Rows of empty slots
      have weight 0.
    group_tokens: N, consecutive tokens that compete for the same slots.
    capacity: C, slots per expert and group.
    priority_TK: assignments with higher priority get slots first; None means by position.
    n_devices: number of devices the experts are split over evenly. The expert axis of the rows is
      ordered by local index, then device: the first expert of every device, then the second of
      every device, and so on, so that no transpose is needed before the all-to-all.

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
  """A partial one-to-one map between assignments (choice, token) and slots, stored both ways.

  Slots are ordered by expert, so those of an expert are contiguous: S = E*G*C here; for the
  layout without a capacity see dropless.py.
  Assignments are numbered choice-major, k*T + t: with K, which is small, as the minor axis, a TPU
  would fill few of its lanes and relayout each such array before using it.

  Attributes:
    assignment_S: index into the flattened K*T assignments; K*T for an empty slot.
    slot_KT: the slot of each assignment; S for a dropped one.
  """

  assignment_S: jax.Array
  slot_KT: jax.Array


def assign_slots(expert_TK: jax.Array, n_exp: int, group_tokens: int, capacity: int,
                 priority_TK: jax.Array | None = None) -> Slots:
  """Assigns each assignment a slot of its expert, earlier positions in the group first.

  With priorities the highest go first, and position breaks ties. V-MoE's batch-prioritized
  routing (arXiv 2106.05974, section 4.1) is the same for n_topk = 1; for n_topk > 1 it ranks
  tokens by their largest weight and serves all first choices before any second choice, whereas
  here each expert ranks the assignments it received.

  Args:
    expert_TK: int32, the experts of each token; T must be whole groups.
    n_exp: E, number of experts.
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

  # Slot -> assignment: the c-th assignment of expert e is at start + c in sorted order.
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
  """Sorts the A = N*K assignments of each group by expert, then by position.

  Expert and position are packed into one sort key if 31 bits hold both: sorting one array takes
  half as long as sorting pairs, both to run and, on a TPU, to compile. The keys are laid out
  choice-major, since a minor axis of size K would leave most of a TPU's lanes empty.

  Returns:
    order_GA, the index n * K + k of each assignment, and sorted_GA, its expert.
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
  """Renumbers the assignments of `sort_by_expert` from n * K + k to k * n_tokens + n."""
  return order % n_topk * n_tokens + order // n_topk


def unsorted(value_GA: jax.Array, order_GA: jax.Array, n_topk: int) -> jax.Array:
  """value_KT: undoes the order of `sort_by_expert`; T = G*N."""
  n_groups, n_assigned = order_GA.shape
  n_tokens = n_assigned // n_topk
  place_GA = choice_first(order_GA, n_topk, n_tokens)
  value_GA = jnp.zeros_like(value_GA).at[jnp.arange(n_groups)[:, None], place_GA].set(
      value_GA, unique_indices=True)
  return value_GA.reshape(n_groups, n_topk, n_tokens).swapaxes(0, 1).reshape(n_topk, -1)


# Moving rows. The map between assignments and slots is one-to-one and stored both ways, so the
# gradient of a gather is again a gather, where automatic differentiation would emit a
# scatter-add. An empty slot gets the row of token 0 (its assignment is K*T, a multiple of T), which
# is cheaper than filling in zeros. Its weight is 0, so it contributes exactly 0 to outputs and
# gradients as long as all values are finite.


def _gather_rows(x_TD, slots):
  token_S = slots.assignment_S % x_TD.shape[0]
  return x_TD.at[token_S].get(mode="promise_in_bounds")


def _sum_rows(y_SD, slots):
  # One choice at a time, so that XLA fuses each gather into the sum; one gather of all choices
  # would first write K*T rows to memory.
  def rows(slot_T):
    kept_T1 = (slot_T < y_SD.shape[0])[:, None]
    return jnp.where(kept_T1, y_SD.at[slot_T].get(mode="clip"), 0).astype(jnp.float32)

  return sum(map(rows, slots.slot_KT)).astype(y_SD.dtype)


def _gather_weights(weight_TK, slots):
  return _or_zero(weight_TK.T.ravel(), slots.assignment_S)


def _weights_back(weight_S, slots):
  return _or_zero(weight_S, slots.slot_KT).T


def _or_zero(values, index):
  """values[index], or 0 where the index is one past the end."""
  return values.at[index].get(mode="fill", fill_value=0)


def _with_transpose(linear, transpose, doc: str):
  """Returns linear(x, slots) with the custom gradient transpose(dy, slots)."""
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
