"""The decoder with a KV cache, for autoregressive decoding.

The modules and their weights are those of transformer.py; only attention differs, as it reads
keys and values of earlier tokens from the cache. Nothing is dropped: each token reaches all of
its experts, whatever else is in the batch.

The key of a row's token at position p is in slot p of that row. So rows may be at different
positions, and what the padding after a prompt wrote to later slots is overwritten before any query
can attend to it.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from moe_jax.config import RunConfig, require_causal
from moe_jax.mesh import batch_sharding
from moe_jax.model import functional
from moe_jax.model.attend import dot_product_attention
from moe_jax.model.attention import Attention, rms_norm
from moe_jax.model.transformer import Block, Transformer, gather_whole, logits
from moe_jax.products import multiply

_FLOAT32 = ("norm", "w_router")  # name parts of the weights that the forward pass never rounds


class Cache(NamedTuple):
  """Keys and values: L layers, B rows, C slots per row, K heads of width h."""

  key_LBCKh: jax.Array
  value_LBCKh: jax.Array


def decoding_config(config: RunConfig) -> RunConfig:
  """`config` with dropless dispatch. Raises FieldError for a model that cannot decode."""
  require_causal(config)
  moe = dataclasses.replace(config.moe, dispatch="dropless")
  return dataclasses.replace(config, moe=moe)


def empty_cache(config: RunConfig, batch: int, slots: int, mesh: Mesh) -> Cache:
  """A cache of zeros in the dtype of the activations, its rows split over the mesh like a batch."""
  arch = config.arch
  shape = (arch.n_layers, batch, slots, arch.kv_heads, arch.d_head)
  dtype, sharding = jnp.dtype(config.model.compute_dtype), batch_sharding(mesh, axis=1)
  return Cache(*(jnp.zeros(shape, dtype, device=sharding) for _ in range(2)))


def served(config: RunConfig, params: functional.Params) -> functional.Params:
  """Casts the parameters to the dtype they are multiplied in, for serving.

  The forward pass rounds matrices to the dtype of the activations before it multiplies, so this
  does not change any output. Routers and norms stay in float32.
  """
  dtype = jnp.dtype(config.model.compute_dtype)

  def cast(path, leaf):
    name = path[-1].key
    return leaf if any(part in name for part in _FLOAT32) else leaf.astype(dtype)

  return jax.tree_util.tree_map_with_path(cast, params)


def prefill(config: RunConfig, params: functional.Params, router: functional.Router,
            cache: Cache, tokens_BS: jax.Array, length_B: jax.Array,
            mesh: Mesh) -> tuple[jax.Array, Cache]:
  """Runs prompts through the decoder and writes their keys and values to the first slots.

  Args:
    config: from decoding_config.
    params: of the model, or `served`.
    router: state of the model's routers.
    cache: of at least S slots; B is a multiple of the number of devices.
    tokens_BS: int32, each prompt padded at its end.
    length_B: int32, length of each prompt, at least 1.
    mesh: where it runs.

  Returns:
    logits_BV in float32, for the token after each prompt, and the updated cache.
  """
  model = functional.merged(config, params, router)
  x_BSD, cache = _layers(model, cache, tokens_BS, None, mesh)
  x_BD = jnp.take_along_axis(x_BSD, (length_B - 1)[:, None, None], axis=1)[:, 0]
  return logits(*model.before_head(x_BD, mesh), mesh), cache


def decode(config: RunConfig, params: functional.Params, router: functional.Router,
           cache: Cache, token_B: jax.Array, position_B: jax.Array,
           mesh: Mesh) -> tuple[jax.Array, Cache]:
  """Decodes one token per row; for the other arguments and the result see prefill.

  Args:
    token_B: int32, the token of each row.
    position_B: int32, its position, less than the number of slots; all earlier positions must be
      in the cache.
  """
  model = functional.merged(config, params, router)
  x_B1D, cache = _layers(model, cache, token_B[:, None], position_B, mesh)
  return logits(*model.before_head(x_B1D[:, 0], mesh), mesh), cache


def _layers(model: Transformer, cache: Cache, tokens_BS, position_B, mesh):
  """Runs all layers; `position_B` is None for prompts, which start at slot 0."""
  x_BSD, first = model.embed(tokens_BS, mesh), 0
  for layers in model.stacks():
    x_BSD, cache, first = _scan(layers, x_BSD, cache, first, position_B, mesh)
  return x_BSD, cache


def _scan(layers: Block, x_BSD, cache: Cache, first: int, position_B, mesh):
  """Runs stacked blocks, whose layers in the cache start at `first`; also returns their end.

  The cache is carried rather than scanned over, so that it is updated in place.
  """
  graphdef, stacked = nnx.split(layers)

  def body(carried, layer):
    x_BSD, cache = carried
    number, weights = layer
    block = nnx.merge(graphdef, weights)
    x_BSD = jax.lax.with_sharding_constraint(x_BSD, batch_sharding(mesh))
    gather = functools.partial(gather_whole, mesh=mesh, dtype=x_BSD.dtype)
    normed_BSD = rms_norm(x_BSD, block.attention_norm_D[...], block.config.model.norm_eps)
    y_BSD, cache = _attend(block.attention, normed_BSD, cache, number, position_B, gather,
                            mesh)
    x_BSD, _ = block.feed_forward(x_BSD + y_BSD, mesh)
    return (x_BSD, cache), None

  n_layers = len(jax.tree.leaves(stacked)[0])
  (x_BSD, cache), _ = jax.lax.scan(body, (x_BSD, cache),
                                   (first + jnp.arange(n_layers), stacked))
  return x_BSD, cache, first + n_layers


def _attend(attention: Attention, x_BSD, cache: Cache, number, position_B, gather, mesh):
  """Attention of layer `number`, and the cache with that layer's new keys and values."""
  if position_B is None:
    query_BSHh, key_BSKh, value_BSKh = attention.project(x_BSD, gather, mesh)
    cache = Cache(*(jax.lax.dynamic_update_slice(old, new[None], (number, 0, 0, 0, 0))
                    for old, new in zip(cache, (key_BSKh, value_BSKh), strict=True)))
    out_BSHh = dot_product_attention(query_BSHh, key_BSKh, value_BSKh, mesh, is_causal=True)
  else:
    query_B1Hh, *new = attention.project(x_BSD, gather, mesh, position_B[:, None])
    row_B = jnp.arange(len(position_B))
    cache = Cache(*(old.at[number, row_B, position_B].set(new_B1Kh[:, 0], unique_indices=True)
                    for old, new_B1Kh in zip(cache, new, strict=True)))
    key_BCKh, value_BCKh = (jax.lax.dynamic_index_in_dim(whole, number, keepdims=False)
                            for whole in cache)
    seen_BC = jnp.arange(key_BCKh.shape[1]) <= position_B[:, None]
    out_BSHh = dot_product_attention(query_B1Hh, key_BCKh, value_BCKh, mesh,
                                     mask=seen_BC[:, None, None])
  return multiply(out_BSHh, gather(attention.w_out_HhD), mesh, axes=2), cache
