"""Dropless dispatch: sort the assignments by expert, multiply the groups, sort back.

    dropless_dispatch(x_TD, routing, run_groups) -> (y_TD, dropped_T)

Nothing is dropped and no expert's share is padded to a capacity: a group has as many rows as
there are. The rows move by the same gathers as in `capacity_dispatch`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe_jax.moe.dispatch import (
    Slots,
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
  """Every token at all of its experts, with a row for each assignment.

  Args:
    x_TD: tokens.
    routing: where they go.
    run_groups: (x_SD, weight_S, size_E) -> y_SD, outputs times weights, for rows in the layout of
      grouped_matmul.py, S = T*K + SPARE_ROWS.
  """
  with jax.named_scope("dispatch"):
    slots, size_E = sort_slots(routing.expert_TK, routing.prob_TE.shape[-1])
    x_SD, weight_S = gather_rows(x_TD, slots), gather_weights(routing.weight_TK, slots)
  y_SD = run_groups(x_SD, weight_S, size_E)
  with jax.named_scope("combine"):
    return sum_rows(y_SD, slots), jnp.zeros_like(slots.slot_KT[0])


def sort_slots(expert_TK: jax.Array, n_exp: int) -> tuple[Slots, jax.Array]:
  """A slot for each assignment: by expert, then by position; the spare ones are empty.

  Returns:
    The slots, and size_E: assignments of each expert.
  """
  order_1A, sorted_1A = sort_by_expert(expert_TK[None], n_exp)
  bound_E = jnp.searchsorted(sorted_1A[0], jnp.arange(n_exp + 1)).astype(jnp.int32)
  n_tokens, n_topk = expert_TK.shape
  assignment_A = order_1A[0] % n_topk * n_tokens + order_1A[0] // n_topk
  assignment_S = jnp.pad(assignment_A.astype(jnp.int32), (0, SPARE_ROWS),
                         constant_values=expert_TK.size)
  slot_1A = jnp.arange(expert_TK.size, dtype=jnp.int32)[None]
  slot_KT = unsorted(slot_1A, order_1A, n_topk)
  return checkpoint_name((Slots(assignment_S, slot_KT), jnp.diff(bound_E)), SAVED)
