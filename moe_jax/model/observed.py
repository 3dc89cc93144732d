"""A forward pass that also returns each token's experts in every layer.

Blocks run unchanged; the routing decisions are recomputed from the same inputs next to them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from moe_jax.mesh import batch_sharding
from moe_jax.model.transformer import Block, Transformer, gather_whole
from moe_jax.moe.dispatch import assign_slots
from moe_jax.moe.layer import priority
from moe_jax.moe.router import RouterSums, route


class Choices(NamedTuple):
  """The routing of each token in each MoE layer.

  Attributes:
    expert_LBSK: int16 (int32 from 32,768 experts on), the token's experts, best first.
    dropped_LBSK: bool, whether that expert had no slot for the token.
    entropy_LBS: float32, entropy of the router's distribution, in nats.
  """

  expert_LBSK: jax.Array
  dropped_LBSK: jax.Array
  entropy_LBS: jax.Array


def features(model: Transformer, inputs_BS: jax.Array, segments_BS: jax.Array, mesh: Mesh,
             counted_BS: jax.Array) -> tuple[jax.Array, jax.Array, RouterSums, Choices]:
  """Transformer.features, and the choices. Needs a token-choice router and an MoE layer."""
  x_BSD = model.embed(inputs_BS, mesh)
  for layers in model.stacks():
    x_BSD, found = _scan(layers, x_BSD, segments_BS, mesh, counted_BS)
  return *model.before_head(x_BSD, mesh), *found


def _scan(layers: Block, x_BSD, segments_BS, mesh, counted_BS):
  graphdef, stacked = nnx.split(layers)

  def body(x_BSD, weights):
    x_BSD = jax.lax.with_sharding_constraint(x_BSD, batch_sharding(mesh))
    block = nnx.merge(graphdef, weights)
    x_BSD = block.attend(x_BSD, segments_BS, mesh)
    y_BSD, sums = block.feed_forward(x_BSD, mesh, counted_BS)
    if block.dense:
      return y_BSD, None
    return y_BSD, (sums, _choices(block, block.before_feed_forward(x_BSD), mesh, counted_BS))

  return jax.lax.scan(body, x_BSD, stacked)


def _choices(block: Block, x_BSD, mesh, counted_BS) -> Choices:
  moe, semantics = block.moe, block.moe.semantics
  routing = route(x_BSD.reshape(-1, x_BSD.shape[-1]),
                  gather_whole(moe.w_router_DE, mesh, jnp.float32), semantics.n_topk,
                  semantics.norm_topk_prob, None if moe.bias_E is None else moe.bias_E[...])
  dropped_TK = jnp.zeros(routing.expert_TK.shape, bool)
  if semantics.dispatch == "capacity":
    slots = assign_slots(routing.expert_TK, routing.prob_TE.shape[1], semantics.group_tokens,
                         semantics.capacity, priority(routing, semantics, counted_BS.ravel()))
    dropped_TK = (slots.slot_KT == slots.assignment_S.size).T
  by_row = (*x_BSD.shape[:2], semantics.n_topk)
  dtype = jnp.int16 if routing.prob_TE.shape[1] < 2**15 else jnp.int32
  return Choices(routing.expert_TK.astype(dtype).reshape(by_row), dropped_TK.reshape(by_row),
                 jax.scipy.special.entr(routing.prob_TE).sum(-1).reshape(by_row[:2]))
