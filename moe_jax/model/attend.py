"""Causal self-attention, with the fastest implementation for each platform."""

import contextlib

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from moe_jax.mesh import platform_of
from moe_jax.model import flash, splash
from moe_jax.products import einsum, precision_of, turned

_CPU_BLOCKS = 4  # blocks of queries: 4 skip 3/8 of all scores, 8 would skip 7/16


def attend(query_BSHh: jax.Array, key_BSKh: jax.Array, value_BSKh: jax.Array,
           segments_BS: jax.Array | None, mesh: Mesh) -> jax.Array:
  """out_BSHh: softmax(query key / sqrt(h)) value over positions up to the query's own.

  Args:
    query_BSHh: H query heads, a multiple of the K heads of keys and values.
    key_BSKh, value_BSKh: of the dtype of the queries. The softmax is in float32.
    segments_BS: int32, the document of each position, which attention stays within; None for
      attention across documents.
    mesh: B is split over it; the platform of its devices selects the implementation.
  """
  platform = platform_of(mesh)
  if platform == "cpu":
    return _by_query_blocks(query_BSHh, key_BSKh, value_BSKh, segments_BS)
  if platform == "tpu" and splash.suits(query_BSHh):
    return splash.splash_attention(query_BSHh, key_BSKh, value_BSKh, segments_BS, mesh)
  if platform == "gpu" and flash.suits(query_BSHh):
    return flash.flash_attention(query_BSHh, key_BSKh, value_BSKh, segments_BS, mesh)
  return plain_attention(query_BSHh, key_BSKh, value_BSKh, segments_BS, mesh)


def plain_attention(query_BSHh: jax.Array, key_BSKh: jax.Array, value_BSKh: jax.Array,
                    segments_BS: jax.Array | None, mesh: Mesh) -> jax.Array:
  """`attend` on any platform; materializes all scores."""
  mask_B1SS = None
  if segments_BS is not None:
    mask_B1SS = (segments_BS[:, :, None] == segments_BS[:, None, :])[:, None]
  return dot_product_attention(query_BSHh, key_BSKh, value_BSKh, mesh, mask=mask_B1SS,
                               is_causal=True)


def dot_product_attention(query: jax.Array, key: jax.Array, value: jax.Array, mesh: Mesh,
                          **which) -> jax.Array:
  """jax.nn.dot_product_attention with full float32 precision; `which`: mask and is_causal."""
  precision = precision_of(query.dtype, platform_of(mesh))
  # It has no precision argument; a context also covers its gradient.
  told = contextlib.nullcontext() if precision is None else jax.default_matmul_precision("highest")
  with told:
    return jax.nn.dot_product_attention(query, key, value, **which)


def _by_query_blocks(query_BSHh, key_BSKh, value_BSKh, segments_BS):
  """Attends one block of queries at a time, to the keys up to the end of the block."""
  b, seq_len, n_heads, h = query_BSHh.shape
  n_kv = key_BSKh.shape[2]
  query_BKGSh = query_BSHh.reshape(b, seq_len, n_kv, n_heads // n_kv, h).transpose(0, 2, 3, 1, 4)
  out_BKGSh = _heads_first(query_BKGSh, key_BSKh.swapaxes(1, 2), value_BSKh.swapaxes(1, 2),
                           segments_BS)
  return out_BKGSh.transpose(0, 3, 1, 2, 4).reshape(query_BSHh.shape)


# Blocks of scores above the diagonal are skipped. The others exist for one block of queries at a
# time and are recomputed in the backward pass from the saved log-sum-exps (as in FlashAttention,
# arXiv 2205.14135): on a CPU, memory traffic and exponentials dominate, not products.


@jax.custom_vjp
def _heads_first(query_BKGSh, key_BKSh, value_BKSh, segments_BS):
  return _heads_first_fwd(query_BKGSh, key_BKSh, value_BKSh, segments_BS)[0]


def _heads_first_fwd(query_BKGSh, key_BKSh, value_BKSh, segments_BS):
  h, outs, lses = query_BKGSh.shape[-1], [], []
  for part in _parts(query_BKGSh.shape[3]):
    score_BKGQS = einsum("bkgqh,bksh->bkgqs", query_BKGSh[..., part, :],
                         key_BKSh[:, :, :part.stop])
    score_BKGQS = jnp.where(_seen(segments_BS, part), score_BKGQS * h**-0.5, -jnp.inf)
    max_BKGQ = score_BKGQS.max(-1)
    exp_BKGQS = jnp.exp(score_BKGQS - max_BKGQ[..., None])
    sum_BKGQ = exp_BKGQS.sum(-1)
    out_BKGQh = einsum("bkgqs,bksh->bkgqh", exp_BKGQS.astype(value_BKSh.dtype),
                       value_BKSh[:, :, :part.stop])
    outs.append((out_BKGQh / sum_BKGQ[..., None]).astype(value_BKSh.dtype))
    lses.append(max_BKGQ + jnp.log(sum_BKGQ))
  out_BKGSh, lse_BKGS = jnp.concatenate(outs, axis=3), jnp.concatenate(lses, axis=3)
  return out_BKGSh, (query_BKGSh, key_BKSh, value_BKSh, segments_BS, out_BKGSh, lse_BKGS)


def _heads_first_bwd(residuals, dout_BKGSh):
  query_BKGSh, key_BKSh, value_BKSh, segments_BS, out_BKGSh, lse_BKGS = residuals
  dtype, (b, n_kv, n_groups, seq_len, h) = query_BKGSh.dtype, query_BKGSh.shape
  # The softmax's normalization subtracts this from the gradient of each row of probabilities.
  common_BKGS = (dout_BKGSh.astype(jnp.float32) * out_BKGSh.astype(jnp.float32)).sum(-1)
  key_BKhS = turned(key_BKSh)
  dqueries, dkey_BKSh, dvalue_BKSh = [], 0.0, 0.0
  # With keys as the major axis of the scores, no product needs a transposed first factor.
  for part in _parts(seq_len):
    keys, rows = slice(part.stop), (b, n_kv, -1, h)
    query_BKRh = query_BKGSh[..., part, :].reshape(rows)  # R = G * Q
    dout_BKRh = dout_BKGSh[..., part, :].reshape(rows)
    lse_BKR, common_BKR = (x[..., part].reshape(b, n_kv, 1, -1) for x in (lse_BKGS, common_BKGS))
    score_BKSR = einsum("bksh,bkrh->bksr", key_BKSh[:, :, keys], query_BKRh)
    seen_BKSGQ = jnp.moveaxis(_seen(segments_BS, part), -1, 2)
    score_BKSGQ = score_BKSR.reshape(*score_BKSR.shape[:3], n_groups, -1)
    score_BKSR = jnp.where(seen_BKSGQ, score_BKSGQ * h**-0.5, -jnp.inf).reshape(score_BKSR.shape)
    prob_BKSR = jnp.exp(score_BKSR - lse_BKR)
    dprob_BKSR = einsum("bksh,bkrh->bksr", value_BKSh[:, :, keys], dout_BKRh)
    dscore_BKSR = (prob_BKSR * (dprob_BKSR - common_BKR) * h**-0.5).astype(dtype)
    dquery_BKhR = einsum("bkhs,bksr->bkhr", key_BKhS[..., keys], dscore_BKSR)
    dqueries.append(dquery_BKhR.reshape(b, n_kv, h, n_groups, -1))
    rest = ((0, 0), (0, 0), (0, seq_len - part.stop), (0, 0))
    dkey_BKSh += jnp.pad(einsum("bksr,bkrh->bksh", dscore_BKSR, query_BKRh), rest)
    dvalue_BKSh += jnp.pad(einsum("bksr,bkrh->bksh", prob_BKSR.astype(dtype), dout_BKRh), rest)
  dquery_BKGSh = jnp.concatenate(dqueries, axis=-1).transpose(0, 1, 3, 4, 2)
  return dquery_BKGSh.astype(dtype), dkey_BKSh.astype(dtype), dvalue_BKSh.astype(dtype), None


_heads_first.defvjp(_heads_first_fwd, _heads_first_bwd)


def _parts(seq_len: int) -> list[slice]:
  rows = -(-seq_len // _CPU_BLOCKS)
  return [slice(start, min(start + rows, seq_len)) for start in range(0, seq_len, rows)]


def _seen(segments_BS, part: slice):
  """seen_BKGQS: whether each query of a block may attend to each key up to the block's end."""
  seen_BQS = (jnp.arange(part.stop) <= jnp.arange(part.start, part.stop)[:, None])[None]
  if segments_BS is not None:
    seen_BQS &= segments_BS[:, part, None] == segments_BS[:, None, :part.stop]
  return seen_BQS[:, None, None]
