"""The decoder: pre-norm blocks of attention and experts, scanned over layers.

These are nnx modules; `functional.py` turns them into pure functions of a plain nested dict.
"""

import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from moe_jax.bfloat16 import saves_bits
from moe_jax.config import RunConfig
from moe_jax.mesh import batch_sharding, platform_of, replicated
from moe_jax.model import init, splash
from moe_jax.model.attention import Attention, rms_norm
from moe_jax.model.embedding import look_up
from moe_jax.moe import expert_parallel, router
from moe_jax.moe.expert_parallel import sharded_moe_layer
from moe_jax.moe.experts import EXPERT_AXES, Experts, gated
from moe_jax.moe.layer import Semantics
from moe_jax.moe.router import RouterSums
from moe_jax.products import einsum, multiply, multiply_each, precision_of

Gather = Callable[..., jax.Array]  # gather_whole, with mesh and dtype bound

_save_named = jax.checkpoint_policies.save_only_these_names
_REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable, _save_named(router.SAVED)),
    "rows": _save_named(router.SAVED, expert_parallel.SAVED, splash.SAVED),
    "full": _save_named(router.SAVED),
}


def gather_whole(weight: nnx.Param, mesh: Mesh, dtype: jnp.dtype) -> jax.Array:
  """Casts a weight to the dtype it is multiplied in and all-gathers it.

  The cast comes first, so that half the bytes are moved. The all-gather is explicit, once per
  layer, because XLA would turn each matrix product with a sharded weight into a loop over shards.
  """
  return jax.lax.with_sharding_constraint(weight[...].astype(dtype), replicated(mesh))


class SwiGLU(nnx.Module):
  """A dense feed-forward layer: w_down(silu(x w_gate) * (x w_up)), no bias."""

  def __init__(self, d_model: int, hidden: int, down_scale: float, rngs: nnx.Rngs):
    self.w_gate_DF = init.matrix(rngs, (d_model, hidden), ("d_model", None), fan_in=d_model)
    self.w_up_DF = init.matrix(rngs, (d_model, hidden), ("d_model", None), fan_in=d_model)
    self.w_down_FD = init.matrix(rngs, (hidden, d_model), (None, "d_model"), fan_in=hidden,
                                 scale=down_scale)

  def __call__(self, x_BSD: jax.Array, gather: Gather, mesh: Mesh) -> jax.Array:
    """y_BSD; `gather` casts and all-gathers a weight before it is multiplied."""
    gate_BSF, up_BSF = multiply_each(x_BSD, [gather(self.w_gate_DF), gather(self.w_up_DF)], mesh)
    return multiply(gated(gate_BSF, up_BSF), gather(self.w_down_FD), mesh)


class RouterState(nnx.Variable):
  """State of a router beside its weights, updated every step; no gradient, no weight decay."""


class MoE(nnx.Module):
  """Routed experts, plus shared experts if there are any."""

  def __init__(self, config: RunConfig, rngs: nnx.Rngs):
    arch = config.arch
    d, f, e = arch.d_model, arch.d_expert, arch.n_exp
    down_scale = init.residual_scale(arch)
    routed_scale = down_scale * init.routed_scale(arch, config.moe)
    self.semantics = Semantics.of(config)
    self.w_router_DE = init.matrix(rngs, (d, e), ("d_model", None), fan_in=d,
                                   scale=init.ROUTER_SCALE)
    sigmoid = config.moe.router == "sigmoid"
    self.bias_E = RouterState(jnp.zeros(e, jnp.float32), axes=(None,)) if sigmoid else None
    axes = EXPERT_AXES
    self.w_gate_EDF = init.matrix(rngs, (e, d, f), axes.w_gate_EDF, fan_in=d)
    self.w_up_EDF = init.matrix(rngs, (e, d, f), axes.w_up_EDF, fan_in=d)
    self.w_down_EFD = init.matrix(rngs, (e, f, d), axes.w_down_EFD, fan_in=f,
                                  scale=routed_scale)
    if arch.n_shared_experts:
      self.shared = SwiGLU(d, arch.n_shared_experts * f, down_scale, rngs)

  def __call__(self, x_BSD: jax.Array, gather: Gather, mesh: Mesh, counted_BS: jax.Array | None,
               noise_key_B: jax.Array | None) -> tuple[jax.Array, RouterSums]:
    """y_BSD and the router's sums; for the arguments see sharded_moe_layer."""
    experts = Experts(self.w_gate_EDF[...], self.w_up_EDF[...], self.w_down_EFD[...])
    bias_E = None if self.bias_E is None else self.bias_E[...]
    y_BSD, sums = sharded_moe_layer(x_BSD, gather(self.w_router_DE, dtype=jnp.float32), experts,
                                    self.semantics, mesh, counted_BS, bias_E, noise_key_B)
    if hasattr(self, "shared"):
      y_BSD += self.shared(x_BSD, gather, mesh)
    return y_BSD, sums


class Block(nnx.Module):
  """x + attention(norm(x)), then x + feed_forward(norm(x)) with a dense or MoE layer."""

  def __init__(self, config: RunConfig, dense: bool, rngs: nnx.Rngs):
    arch = config.arch
    self.config, self.dense = config, dense
    self.attention_norm_D = init.ones(arch.d_model)
    self.attention = Attention(config, rngs)
    self.ff_norm_D = init.ones(arch.d_model)
    if dense:
      self.ff = SwiGLU(arch.d_model, arch.dense_width, init.residual_scale(arch), rngs)
    else:
      self.moe = MoE(config, rngs)

  def __call__(self, x_BSD: jax.Array, segments_BS: jax.Array, mesh: Mesh,
               counted_BS: jax.Array | None, noise_key_B: jax.Array | None
               ) -> tuple[jax.Array, RouterSums | None]:
    """y_BSD, and the router's sums (None if dense); see Transformer.features."""
    return self.feed_forward(self.attend(x_BSD, segments_BS, mesh), mesh, counted_BS, noise_key_B)

  def attend(self, x_BSD: jax.Array, segments_BS: jax.Array, mesh: Mesh) -> jax.Array:
    """x + attention(norm(x))."""
    normed_BSD = rms_norm(x_BSD, self.attention_norm_D[...], self.config.model.norm_eps)
    gather = functools.partial(gather_whole, mesh=mesh, dtype=x_BSD.dtype)
    return x_BSD + self.attention(normed_BSD, segments_BS, gather, mesh)

  def feed_forward(self, x_BSD: jax.Array, mesh: Mesh, counted_BS: jax.Array | None = None,
                   noise_key_B: jax.Array | None = None
                   ) -> tuple[jax.Array, RouterSums | None]:
    """x + feed_forward(norm(x)), and the router's sums (None if dense)."""
    normed_BSD = self.before_feed_forward(x_BSD)
    gather = functools.partial(gather_whole, mesh=mesh, dtype=x_BSD.dtype)
    if self.dense:
      return x_BSD + self.ff(normed_BSD, gather, mesh), None
    y_BSD, sums = self.moe(normed_BSD, gather, mesh, counted_BS, noise_key_B)
    return x_BSD + y_BSD, sums

  def before_feed_forward(self, x_BSD: jax.Array) -> jax.Array:
    """The input of the feed-forward layer and its router."""
    return rms_norm(x_BSD, self.ff_norm_D[...], self.config.model.norm_eps)


class Transformer(nnx.Module):
  """Embedding, dense layers, MoE layers, output head. Layers of the same kind are stacked."""

  def __init__(self, config: RunConfig, rngs: nnx.Rngs):
    arch = config.arch
    self.config = config
    self.embedding_VD = init.matrix(rngs, (arch.vocab_size, arch.d_model), (None, "d_model"),
                                    fan_in=arch.d_model)
    if arch.n_dense_layers:
      self.dense_layers = _stack(config, True, arch.n_dense_layers, rngs)
    if arch.n_moe_layers:
      self.moe_layers = _stack(config, False, arch.n_moe_layers, rngs)
    self.final_norm_D = init.ones(arch.d_model)
    if not arch.tie_embeddings:
      self.w_head_DV = init.matrix(rngs, (arch.d_model, arch.vocab_size), ("d_model", None),
                                   fan_in=arch.d_model)

  def __call__(self, inputs_BS: jax.Array, segments_BS: jax.Array, mesh: Mesh,
               remat: str = "none", counted_BS: jax.Array | None = None,
               noise_key_B: jax.Array | None = None
               ) -> tuple[jax.Array, RouterSums | None]:
    """Runs the decoder.

    Args:
      inputs_BS: int32 token ids, B split over all mesh axes.
      segments_BS: int32, the document of each position.
      mesh: where it runs.
      remat: what the backward pass recomputes: none, dots, rows or full.
      counted_BS: bool, False for padding, which the router's sums omit; None counts all.
      noise_key_B: a random key per row, for the router's jitter; None for no jitter.

    Returns:
      logits_BSV in float32, and the router's sums with a leading axis over MoE layers (None
      if there are no MoE layers).
    """
    x_BSD, head_DV, sums = self.features(inputs_BS, segments_BS, mesh, remat, counted_BS,
                                         noise_key_B)
    with jax.named_scope("head"):
      return logits(x_BSD, head_DV, mesh), sums

  def features(self, inputs_BS: jax.Array, segments_BS: jax.Array, mesh: Mesh,
               remat: str = "none", counted_BS: jax.Array | None = None,
               noise_key_B: jax.Array | None = None
               ) -> tuple[jax.Array, jax.Array, RouterSums | None]:
    """x_BSD and head_DV, whose product is the logits, and the router's sums; see __call__."""
    x_BSD, sums = self.embed(inputs_BS, mesh), None
    for layers in self.stacks():
      x_BSD, sums = _scan(layers, x_BSD, segments_BS, mesh, remat, counted_BS, noise_key_B)
    return *self.before_head(x_BSD, mesh), sums

  def embed(self, inputs_BS: jax.Array, mesh: Mesh) -> jax.Array:
    """x_BSD, the input of the first layer."""
    return look_up(self._whole(self.embedding_VD, mesh), inputs_BS, mesh)

  def stacks(self) -> Iterator[Block]:
    """Yields the stacked dense layers and the stacked MoE layers, if any; see _stack."""
    for name in ("dense_layers", "moe_layers"):
      if hasattr(self, name):
        yield getattr(self, name)

  def before_head(self, x: jax.Array, mesh: Mesh) -> tuple[jax.Array, jax.Array]:
    """(x, head_DV), whose product is the logits, from the last layer's outputs x [..., D]."""
    x = rms_norm(x, self.final_norm_D[...], self.config.model.norm_eps)
    with jax.named_scope("head"):
      if self.config.arch.tie_embeddings:
        return x, self._whole(self.embedding_VD, mesh).T
      return x, self._whole(self.w_head_DV, mesh)

  def _whole(self, weight: nnx.Param, mesh: Mesh) -> jax.Array:
    return gather_whole(weight, mesh, jnp.dtype(self.config.model.compute_dtype))


def logits(x: jax.Array, head_DV: jax.Array, mesh: Mesh) -> jax.Array:
  """The logits in float32, from the result of `before_head`."""
  return einsum("...d,dv->...v", x, head_DV,
                precision=precision_of(x.dtype, platform_of(mesh)))


def _stack(config: RunConfig, dense: bool, n_layers: int, rngs: nnx.Rngs) -> Block:
  """`n_layers` blocks whose parameters have a leading layer axis."""

  @nnx.split_rngs(splits=n_layers)
  @nnx.vmap(in_axes=0, out_axes=0)
  def create(rngs):
    return Block(config, dense, rngs)

  return create(rngs)


def _scan(layers: Block, x_BSD, segments_BS, mesh, remat, counted_BS, noise_key_B):
  """Scans over stacked blocks, so that compile time does not grow with depth."""
  graphdef, stacked = nnx.split(layers)
  key_LB = None
  if noise_key_B is not None:
    n_layers = len(jax.tree.leaves(stacked)[0])
    key_LB = jax.vmap(lambda layer: jax.vmap(jax.random.fold_in, (0, None))(noise_key_B, layer))(
        jnp.arange(n_layers))

  def body(x_BSD, layer):
    params, key_B = layer
    x_BSD = jax.lax.with_sharding_constraint(x_BSD, batch_sharding(mesh))
    return nnx.merge(graphdef, params)(x_BSD, segments_BS, mesh, counted_BS, key_B)

  if remat != "none":
    body = jax.checkpoint(body, policy=_REMAT_POLICIES[remat], prevent_cse=False)
  if platform_of(mesh) == "cpu" and x_BSD.dtype == jnp.bfloat16:
    body = saves_bits(body)
  return jax.lax.scan(body, x_BSD, (stacked, key_LB))
