"""The attention layer: rotary positions, queries and keys normalized as in Qwen3 or OLMoE."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from moe_jax.config import RunConfig
from moe_jax.model import init
from moe_jax.model.attend import attend
from moe_jax.products import multiply, multiply_each


@functools.partial(jax.checkpoint, static_argnums=2, prevent_cse=False)
def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
  """x / rms(x) * scale over the last axis, computed in float32, in the dtype of x."""
  x32 = x.astype(jnp.float32)
  normed = x32 * jax.lax.rsqrt(jnp.mean(x32**2, -1, keepdims=True) + eps)
  return (normed * scale).astype(x.dtype)


def rotate(x_BSHh: jax.Array, theta: float, position_BS: jax.Array | None = None) -> jax.Array:
  """Rotary position embedding, rotate-half layout (arXiv 2104.09864).

  Positions count from the start of the sequence unless they are given. Scores depend only on
  differences between positions, so they need no reset for a document that starts in the middle of
  a packed sequence.
  """
  seq_len, h = x_BSHh.shape[1], x_BSHh.shape[-1]
  if position_BS is None:
    position_BS = jnp.arange(seq_len)[None]
  frequency = theta ** (-jnp.arange(0, h, 2, dtype=jnp.float32) / h)
  angle_BS1r = position_BS.astype(jnp.float32)[..., None, None] * frequency
  cos, sin = jnp.cos(angle_BS1r), jnp.sin(angle_BS1r)
  first, second = jnp.split(x_BSHh.astype(jnp.float32), 2, axis=-1)
  turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
  return turned.astype(x_BSHh.dtype)


def _norm_projection(x_BSHh: jax.Array, scale_Hh: jax.Array, eps: float) -> jax.Array:
  """rms_norm over all heads of a token together."""
  flat = rms_norm(x_BSHh.reshape(*x_BSHh.shape[:2], -1), scale_Hh.reshape(-1), eps)
  return flat.reshape(x_BSHh.shape)


class Attention(nnx.Module):
  """Multi-head or grouped-query attention; the weights' names carry their shapes."""

  def __init__(self, config: RunConfig, rngs: nnx.Rngs):
    arch = config.arch
    d, heads, kv_heads, h = arch.d_model, arch.n_heads, arch.kv_heads, arch.d_head
    self.config = config
    self.w_query_DHh = init.matrix(rngs, (d, heads, h), ("d_model", None, None), fan_in=d)
    self.w_key_DKh = init.matrix(rngs, (d, kv_heads, h), ("d_model", None, None), fan_in=d)
    self.w_value_DKh = init.matrix(rngs, (d, kv_heads, h), ("d_model", None, None), fan_in=d)
    self.w_out_HhD = init.matrix(rngs, (heads, h, d), (None, None, "d_model"),
                                 fan_in=heads * h, scale=init.residual_scale(arch))
    if arch.qk_norm == "head":
      self.query_norm_h, self.key_norm_h = init.ones(h), init.ones(h)
    elif arch.qk_norm == "projection":
      self.query_norm_Hh, self.key_norm_Kh = init.ones(heads, h), init.ones(kv_heads, h)

  def __call__(self, x_BSD: jax.Array, segments_BS: jax.Array, gather, mesh: Mesh) -> jax.Array:
    """y_BSD: causal attention, within documents if data.mask_documents.

    Args:
      x_BSD: tokens.
      segments_BS: int32, the document of each token.
      gather: casts and all-gathers a weight before it is multiplied (transformer.gather_whole).
      mesh: B is split over all its axes.
    """
    query_BSHh, key_BSKh, value_BSKh = self.project(x_BSD, gather, mesh)
    with jax.named_scope("attention"):
      segments_BS = segments_BS if self.config.data.mask_documents else None
      out_BSHh = attend(query_BSHh, key_BSKh, value_BSKh, segments_BS, mesh)
    return multiply(out_BSHh, gather(self.w_out_HhD), mesh, axes=2)

  def project(self, x_BSD: jax.Array, gather, mesh: Mesh,
              position_BS: jax.Array | None = None
              ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """query_BSHh, key_BSKh, value_BSKh; queries and keys normalized and rotated.

    `position_BS` are the positions to rotate by, by default 0 to S - 1.
    """
    model = self.config.model
    weights = map(gather, (self.w_query_DHh, self.w_key_DKh, self.w_value_DKh))
    query_BSHh, key_BSKh, value_BSKh = multiply_each(x_BSD, list(weights), mesh)
    with jax.named_scope("attention"):
      if self.config.arch.qk_norm == "head":
        query_BSHh = rms_norm(query_BSHh, self.query_norm_h[...], model.norm_eps)
        key_BSKh = rms_norm(key_BSKh, self.key_norm_h[...], model.norm_eps)
      elif self.config.arch.qk_norm == "projection":
        query_BSHh = _norm_projection(query_BSHh, self.query_norm_Hh[...], model.norm_eps)
        key_BSKh = _norm_projection(key_BSKh, self.key_norm_Kh[...], model.norm_eps)
      query_BSHh = rotate(query_BSHh, model.rope_theta, position_BS)
      key_BSKh = rotate(key_BSKh, model.rope_theta, position_BS)
    return query_BSHh, key_BSKh, value_BSKh
