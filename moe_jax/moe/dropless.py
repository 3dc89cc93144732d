"""Dropless dispatch: sort the assignments by expert, multiply the groups, sort back.

    dropless_dispatch(x_TD, routing, run_groups, block=...) -> (y_TD, dropped_T)

Nothing is dropped and no expert's share is padded to a capacity: a group has as many rows as
there are. The rows move by the same pair of gathers, each the other's transpose, as in
`capacity_dispatch`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from moe_jax.moe.dispatch import Slots, combine_rows, gather_rows
from moe_jax.moe.grouped_matmul import experts_of_blocks, group_starts, n_block_rows
from moe_jax.moe.router import Routing

RunGroups = Callable[[jax.Array, jax.Array], jax.Array]


def dropless_dispatch(x_TD: jax.Array, routing: Routing, run_groups: RunGroups, *,
                      block: int) -> tuple[jax.Array, jax.Array]:
  """Every token at all of its experts, with a row for each assignment.

  Args:
    x_TD: tokens.
    routing: where they go.
    run_groups: (x_SD, size_E) -> y_SD, for rows in the layout of grouped_matmul.py.
    block: of that layout.
  """
  slots, size_E = sort_slots(routing.expert_TK, routing.prob_TE.shape[-1], block)
  y_SD = run_groups(gather_rows(x_TD, slots), size_E)
  return combine_rows(y_SD, routing.weight_TK, slots), jnp.zeros_like(slots.slot_TK[:, 0])


def sort_slots(expert_TK: jax.Array, n_exp: int, block: int) -> tuple[Slots, jax.Array]:
  """A slot for each assignment: expert first, then by position, groups laid out in blocks.

  Returns:
    The slots, and size_E: assignments of each expert.
  """
  n_assigned = expert_TK.size
  expert_A = expert_TK.ravel()
  order_A = jnp.argsort(expert_A, stable=True).astype(jnp.int32)
  sorted_A = expert_A[order_A]
  bound_E = jnp.searchsorted(sorted_A, jnp.arange(n_exp + 1)).astype(jnp.int32)
  size_E = jnp.diff(bound_E)
  shift_E = group_starts(size_E, block) - bound_E[:-1]  # from a sorted place to its slot

  # Slot -> assignment. The slots that fill a group's last block, and those after the last
  # group, are empty.
  n_slots = n_block_rows(n_assigned, n_exp, block)
  expert_J = experts_of_blocks(size_E, n_slots // block, block)
  expert_S = jnp.repeat(expert_J, block, total_repeat_length=n_slots)
  place_S = jnp.arange(n_slots) - shift_E.at[expert_S].get(mode="clip")
  filled_S = place_S < bound_E.at[expert_S + 1].get(mode="fill", fill_value=0)
  assignment_S = jnp.where(filled_S, order_A.at[place_S].get(mode="clip"), n_assigned)

  # Assignment -> slot: the inverse.
  slot_A = jnp.arange(n_assigned, dtype=jnp.int32) + shift_E[sorted_A]
  slot_A = jnp.zeros_like(slot_A).at[order_A].set(slot_A, unique_indices=True)
  return Slots(assignment_S, slot_A.reshape(expert_TK.shape)), size_E
