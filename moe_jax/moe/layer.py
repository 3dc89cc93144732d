"""The MoE layer on one device: routes, dispatches, runs the experts and combines."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.config import RunConfig
from moe_jax.moe.dispatch import (
    RunExperts,
    capacity_dispatch,
    expert_capacity,
    reference_dispatch,
)
from moe_jax.moe.dropless import RunGroups, dropless_dispatch, packed_dispatch
from moe_jax.moe.expert_choice import (
    choice_dispatch,
    choice_sums,
    choose_tokens,
    reference_choice_dispatch,
)
from moe_jax.moe.router import RouterSums, Routing, route, router_logits, router_sums


class Semantics(NamedTuple):
  """Routing and dispatch semantics, resolved from a RunConfig; static under jit.

  Attributes:
    n_topk: experts per token.
    norm_topk_prob: whether the chosen weights are divided by their sum.
    group_tokens: tokens per routing group.
    capacity: slots per expert and group, if `dispatch` is "capacity" and tokens choose experts.
    dispatch, router, jitter, drop_order: as in MoEConfig.
  """

  n_topk: int
  norm_topk_prob: bool
  group_tokens: int
  capacity: int
  dispatch: str = "capacity"
  router: str = "softmax"
  jitter: float = 0.0
  drop_order: str = "position"

  @classmethod
  def of(cls, config: RunConfig) -> "Semantics":
    """Resolves the semantics of `config`, defaults included."""
    arch, moe = config.arch, config.moe
    capacity = expert_capacity(moe.capacity_factor, config.group_tokens, arch.n_topk,
                               arch.n_exp)
    return cls(arch.n_topk, moe.norm_topk_prob, config.group_tokens, capacity, moe.dispatch,
               moe.router, moe.jitter, moe.drop_order)


def moe_layer(x_TD: jax.Array, w_router_DE: jax.Array, run_experts: RunExperts | RunGroups,
              semantics: Semantics, counted_T: jax.Array | None = None,
              bias_E: jax.Array | None = None, noise_TD: jax.Array | None = None,
              n_devices: int = 1, packed: bool = False) -> tuple[jax.Array, RouterSums]:
  """Applies the MoE layer to the tokens of one device.

  Args:
    x_TD: tokens; T must be whole routing groups.
    w_router_DE: router weights.
    run_experts: computes the experts' outputs: a RunGroups if the dispatch is dropless or
      `packed`, else a RunExperts (see dispatch.py).
    semantics: see `Semantics`.
    counted_T: bool, False for padding, which the sums omit; None counts all.
    bias_E: selection bias for sigmoid scores; None for the other routers.
    noise_TD: jitter, which multiplies the router's inputs; None for no jitter.
    n_devices: number of devices the experts are split over.
    packed: use packed_dispatch, which has no rows for empty slots; needs n_devices = 1.

  Returns:
    y_TD in the dtype of x_TD, and sums over the tokens.
  """
  assert not packed or n_devices == 1, "packed rows cannot be exchanged between devices"
  assert (bias_E is not None) == (semantics.router == "sigmoid"), "bias_E is of sigmoid alone"
  seen_TD = x_TD if noise_TD is None else x_TD * noise_TD
  in_order = functools.partial(_in_order, run_experts, n_devices)
  if semantics.router == "expert_choice":
    with jax.named_scope("route"):
      choice = choose_tokens(router_logits(seen_TD, w_router_DE), semantics.n_topk,
                             semantics.group_tokens, counted_T)
    dispatch = (reference_choice_dispatch if semantics.dispatch == "reference"
                else choice_dispatch)
    return dispatch(x_TD, choice, in_order), choice_sums(choice, counted_T)

  with jax.named_scope("route"):
    routing = route(seen_TD, w_router_DE, semantics.n_topk, semantics.norm_topk_prob, bias_E)
  if semantics.dispatch == "dropless":
    y_TD, dropped_T = dropless_dispatch(x_TD, routing, run_experts)
  elif semantics.dispatch == "reference":
    y_TD, dropped_T = reference_dispatch(x_TD, routing, in_order)
  else:
    dispatch = packed_dispatch if packed else functools.partial(capacity_dispatch,
                                                                n_devices=n_devices)
    y_TD, dropped_T = dispatch(x_TD, routing, run_experts, group_tokens=semantics.group_tokens,
                               capacity=semantics.capacity,
                               priority_TK=priority(routing, semantics, counted_T))
  return y_TD, router_sums(routing, dropped_T, counted_T)


def _in_order(run_experts: RunExperts, n_devices: int, x_ERD: jax.Array) -> jax.Array:
  """Applies `run_experts`, which expects capacity_dispatch's order, to rows in expert order."""
  n_exp, *rest = x_ERD.shape
  x_PnRD = x_ERD.reshape(n_devices, n_exp // n_devices, *rest).swapaxes(0, 1)
  y_PnRD = run_experts(x_PnRD.reshape(x_ERD.shape)).reshape(x_PnRD.shape)
  return y_PnRD.swapaxes(0, 1).reshape(x_ERD.shape)


def priority(routing: Routing, semantics: Semantics,
             counted_T: jax.Array | None) -> jax.Array | None:
  """Priorities for capacity_dispatch, padding last; None means by position."""
  if semantics.drop_order == "position":
    return None
  weight_TK = jax.lax.stop_gradient(routing.weight_TK)
  return weight_TK if counted_T is None else jnp.where(counted_T[:, None], weight_TK, -1)
