"""The forward pass with its eyes open: which experts each token was sent to, layer by layer.

Blocks run as they are, with somebody at the door of their MoE layer who sees what comes in. What
its router makes of that is computed once more, beside it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from moe_jax.mesh import batch_sharding
from moe_jax.model import cached
from moe_jax.model.transformer import Block, MoE, Transformer, gather_whole
from moe_jax.moe.dispatch import assign_slots
from moe_jax.moe.expert_parallel import Semantics
from moe_jax.moe.router import RouterSums, route


class Choices(NamedTuple):
  """Of each token, for each MoE layer.

  Attributes:
    expert_LBSK: int16, its experts, best first.
    dropped_LBSK: bool, whether that expert had no slot for it.
    entropy_LBS: float32, of the router's distribution, in nats.
  """

  expert_LBSK: jax.Array
  dropped_LBSK: jax.Array
  entropy_LBS: jax.Array


def features(model: Transformer, inputs_BS: jax.Array, segments_BS: jax.Array, mesh: Mesh,
             counted_BS: jax.Array) -> tuple[jax.Array, jax.Array, RouterSums, Choices]:
  """As Transformer.features, and the choices; for token-choice routers and an MoE layer or more."""
  dtype = jnp.dtype(model.config.model.compute_dtype)
  x_BSD = gather_whole(model.embedding_VD, mesh, dtype)[inputs_BS]
  for name in ("dense_layers", "moe_layers"):
    if hasattr(model, name):
      x_BSD, found = _scan(getattr(model, name), x_BSD, segments_BS, mesh, counted_BS)
  return *cached.before_head(model, x_BSD, mesh), *found


def _scan(layers: Block, x_BSD, segments_BS, mesh, counted_BS):
  graphdef, stacked = nnx.split(layers)

  def body(x_BSD, weights):
    x_BSD = jax.lax.with_sharding_constraint(x_BSD, batch_sharding(mesh))
    block = nnx.merge(graphdef, weights)
    if block.dense:
      return block(x_BSD, segments_BS, mesh, counted_BS, None)
    moe = _Watched(block.moe)
    object.__setattr__(block, "moe", moe)  # merged for this trace alone
    y_BSD, sums = block(x_BSD, segments_BS, mesh, counted_BS, None)
    return y_BSD, (sums, _choices(moe, block.config.arch.n_exp, mesh, counted_BS))

  return jax.lax.scan(body, x_BSD, stacked)


class _Watched:
  """An MoE layer, and what came in when it was called."""

  def __init__(self, moe: MoE):
    self.moe, self.seen_BSD = moe, None

  def __call__(self, x_BSD, *arguments):
    self.seen_BSD = x_BSD
    return self.moe(x_BSD, *arguments)


def _choices(watched: _Watched, n_exp: int, mesh, counted_BS) -> Choices:
  moe, x_BSD = watched.moe, watched.seen_BSD
  semantics: Semantics = moe.semantics
  routing = route(x_BSD.reshape(-1, x_BSD.shape[-1]),
                  gather_whole(moe.w_router_DE, mesh, jnp.float32), semantics.n_topk,
                  semantics.norm_topk_prob, None if moe.bias_E is None else moe.bias_E[...])
  dropped_TK = jnp.zeros(routing.expert_TK.shape, bool)
  if semantics.capacity is not None:
    priority_TK = None
    if semantics.drop_order == "score":
      priority_TK = jnp.where(counted_BS.ravel()[:, None], routing.weight_TK, -1)
    slots = assign_slots(routing.expert_TK, n_exp, semantics.group_tokens,
                         semantics.capacity, priority_TK)
    dropped_TK = (slots.slot_KT == slots.assignment_S.size).T
  by_row = (*x_BSD.shape[:2], semantics.n_topk)
  return Choices(routing.expert_TK.astype(jnp.int16).reshape(by_row), dropped_TK.reshape(by_row),
                 jax.scipy.special.entr(routing.prob_TE).sum(-1).reshape(by_row[:2]))
