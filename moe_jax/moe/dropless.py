"""Dispatch without padding: sorts assignments by expert, runs each group of rows, sorts back.

    dropless_dispatch(x_TD, routing, run_groups) -> (y_TD, dropped_T)
    packed_dispatch(x_TD, routing, run_groups, group_tokens=N, capacity=C) -> (y_TD, dropped_T)

Groups are not padded to a capacity: each has exactly the rows sent to its expert. The first
function drops nothing, the second drops what `capacity_dispatch` drops. Both move rows with the
gathers of dispatch.py.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe_jax.moe.dispatch import (
    Slots,
    assign_slots,
    choice_first,
    gather_rows,
    gather_weights,
    sort_by_expert,
    sum_rows,
    unsorted,
)
from moe_jax.moe.grouped_matmul import SPARE_ROWS
from moe_jax.moe.router import SAVED, Routing

RunGroups = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def dropless_dispatch(x_TD: jax.Array, routing: Routing,
                      run_groups: RunGroups) -> tuple[jax.Array, jax.Array]:
  """Sends every token to all of its experts, one row per assignment.

  Args:
    x_TD: tokens.
    routing: the experts and weights of each token.
    run_groups: (x_SD, weight_S, size_E) -> y_SD, outputs times weights, for rows in the layout of
      grouped_matmul.py, S = T*K + SPARE_ROWS.
  """
  with jax.named_scope("dispatch"):
    slots, size_E = sort_slots(routing.expert_TK, routing.prob_TE.shape[-1])
  y_TD = _run_rows(x_TD, routing.weight_TK, slots, size_E, run_groups)
  return y_TD, jnp.zeros_like(slots.slot_KT[0])


def packed_dispatch(x_TD: jax.Array, routing: Routing, run_groups: RunGroups, *,
                    group_tokens: int, capacity: int, priority_TK: jax.Array | None = None
                    ) -> tuple[jax.Array, jax.Array]:
  """Computes the same as `capacity_dispatch`, without rows for empty slots."""
  n_exp = routing.prob_TE.shape[-1]
  with jax.named_scope("dispatch"):
    padded = assign_slots(routing.expert_TK, n_exp, group_tokens, capacity, priority_TK)
    slots, size_E = pack_slots(padded, n_exp)
  y_TD = _run_rows(x_TD, routing.weight_TK, slots, size_E, run_groups)
  return y_TD, (padded.slot_KT == padded.assignment_S.size).sum(0)


def _run_rows(x_TD, weight_TK, slots, size_E, run_groups):
  with jax.named_scope("dispatch"):
    x_SD, weight_S = gather_rows(x_TD, slots), gather_weights(weight_TK, slots)
  y_SD = run_groups(x_SD, weight_S, size_E)
  with jax.named_scope("combine"):
    return sum_rows(y_SD, slots)


def pack_slots(padded: Slots, n_exp: int) -> tuple[Slots, jax.Array]:
  """Moves the used slots to the front, in order, and pads with empty ones to T*K + SPARE_ROWS.

  Returns:
    The slots, and size_E: the number of used slots of each expert.
  """
  n_assigned = padded.slot_KT.size
  n_rows = n_assigned + SPARE_ROWS
  used_S = padded.assignment_S < n_assigned
  place_S = jnp.where(used_S, jnp.cumsum(used_S, dtype=jnp.int32) - 1, n_rows)
  assignment_R = jnp.full(n_rows, n_assigned, jnp.int32).at[place_S].set(
      padded.assignment_S.astype(jnp.int32), mode="drop")
  slot_KT = place_S.at[padded.slot_KT].get(mode="fill", fill_value=n_rows)
  size_E = used_S.reshape(n_exp, -1).sum(-1, dtype=jnp.int32)
  return checkpoint_name((Slots(assignment_R, slot_KT), size_E), SAVED)


def sort_slots(expert_TK: jax.Array, n_exp: int) -> tuple[Slots, jax.Array]:
  """Gives each assignment a slot, by expert, then by position; the SPARE_ROWS slots are empty.

  Returns:
    The slots, and size_E: the number of assignments of each expert.
  """
  order_1A, sorted_1A = sort_by_expert(expert_TK[None], n_exp)
  bound_E = jnp.searchsorted(sorted_1A[0], jnp.arange(n_exp + 1)).astype(jnp.int32)
  n_tokens, n_topk = expert_TK.shape
  assignment_A = choice_first(order_1A[0], n_topk, n_tokens)
  assignment_S = jnp.pad(assignment_A.astype(jnp.int32), (0, SPARE_ROWS),
                         constant_values=expert_TK.size)
  slot_1A = jnp.arange(expert_TK.size, dtype=jnp.int32)[None]
  slot_KT = unsorted(slot_1A, order_1A, n_topk)
  return checkpoint_name((Slots(assignment_S, slot_KT), jnp.diff(bound_E)), SAVED)
