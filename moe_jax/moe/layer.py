"""The MoE layer of one device: route, dispatch, run the experts, combine."""

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
  """What routing and dispatch mean, resolved from a RunConfig; static under jit.

  Attributes:
    n_topk: experts a token.
    norm_topk_prob: whether the chosen weights are divided by their sum.
    group_tokens: tokens in a routing group.
    capacity: slots per expert and group, where `dispatch` is "capacity" and tokens choose.
    dispatch, router, jitter, drop_order: of MoEConfig.
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
    """The semantics of this configuration, defaults resolved."""
    arch, moe = config.arch, config.moe
    capacity = expert_capacity(moe.capacity_factor, config.group_tokens, arch.n_topk,
                               arch.n_exp)
    return cls(arch.n_topk, moe.norm_topk_prob, config.group_tokens, capacity, moe.dispatch,
               moe.router, moe.jitter, moe.drop_order)


def moe_layer(x_TD: jax.Array, w_router_DE: jax.Array, run_experts: RunExperts | RunGroups,
              semantics: Semantics, counted_T: jax.Array | None = None,
              bias_E: jax.Array | None = None, noise_TD: jax.Array | None = None,
              n_devices: int = 1, packed: bool = False) -> tuple[jax.Array, RouterSums]:
  """Routes, dispatches, runs and combines the tokens of one device.

  Args:
    x_TD: tokens; T must be whole routing groups.
    w_router_DE: router weights.
    run_experts: computes the experts' outputs: a RunGroups where the dispatch is dropless or
      `packed`, else a RunExperts (see dispatch.py).
    semantics: see `Semantics`.
    counted_T: bool, False for padding, which the sums leave out; None counts all.
    bias_E: selection bias of sigmoid scores; None for the other routers.
    noise_TD: what the router's inputs are multiplied by; None for no jitter.
    n_devices: over how many the experts lie.
    packed: a capacity has no rows for slots that stay empty; for experts on one device.

  Returns:
    y_TD of the type of x_TD, and sums over the tokens.
  """
  assert not packed or n_devices == 1, "packed rows are in no order that devices could exchange"
  assert (bias_E is not None) == (semantics.router == "sigmoid"), "the bias is of sigmoid scores"
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
  """`run_experts` for rows in the order of the experts, whatever the order it takes."""
  n_exp, *rest = x_ERD.shape
  x_PnRD = x_ERD.reshape(n_devices, n_exp // n_devices, *rest).swapaxes(0, 1)
  y_PnRD = run_experts(x_PnRD.reshape(x_ERD.shape)).reshape(x_PnRD.shape)
  return y_PnRD.swapaxes(0, 1).reshape(x_ERD.shape)


def priority(routing: Routing, semantics: Semantics,
             counted_T: jax.Array | None) -> jax.Array | None:
  """Who is served first at an expert, for capacity_dispatch: None is by position; padding last."""
  if semantics.drop_order == "position":
    return None
  weight_TK = jax.lax.stop_gradient(routing.weight_TK)
  return weight_TK if counted_T is None else jnp.where(counted_T[:, None], weight_TK, -1)
