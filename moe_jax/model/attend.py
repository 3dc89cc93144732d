"""Attention of one sequence's positions to earlier ones, by what is fast on the platform."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from moe_jax.model import splash

_CPU_BLOCKS = 4  # parts of the queries: 4 leave out 3/8 of all scores, 8 would leave out 7/16


def attend(query_BSHh: jax.Array, key_BSKh: jax.Array, value_BSKh: jax.Array,
           segments_BS: jax.Array | None, mesh: Mesh) -> jax.Array:
  """out_BSHh: softmax(query key / sqrt(h)) value over positions up to one's own.

  Args:
    query_BSHh: H query heads, a multiple of the K heads of keys and values.
    key_BSKh, value_BSKh: of the type of the queries. Softmax is in float32.
    segments_BS: int32, the document of each position: attention stays within it. None for
      no such limit.
    mesh: of devices whose platform decides how it is done; B is split over it.
  """
  platform = mesh.devices.flat[0].platform
  if platform == "cpu":
    return _by_query_blocks(query_BSHh, key_BSKh, value_BSKh, segments_BS)
  if platform == "tpu" and splash.suits(query_BSHh):
    return splash.splash_attention(query_BSHh, key_BSKh, value_BSKh, segments_BS, mesh)
  return plain_attention(query_BSHh, key_BSKh, value_BSKh, segments_BS)


def plain_attention(query_BSHh: jax.Array, key_BSKh: jax.Array, value_BSKh: jax.Array,
                    segments_BS: jax.Array | None) -> jax.Array:
  """JAX's own: all scores at once, on any platform."""
  mask_B1SS = None
  if segments_BS is not None:
    mask_B1SS = (segments_BS[:, :, None] == segments_BS[:, None, :])[:, None]
  return jax.nn.dot_product_attention(query_BSHh, key_BSKh, value_BSKh, mask=mask_B1SS,
                                      is_causal=True)


def _by_query_blocks(query_BSHh, key_BSKh, value_BSKh, segments_BS):
  """A part of the queries at a time, with the keys that it may see."""
  b, seq_len, n_heads, h = query_BSHh.shape
  n_kv = key_BSKh.shape[2]
  query_BKGSh = query_BSHh.reshape(b, seq_len, n_kv, n_heads // n_kv, h).transpose(0, 2, 3, 1, 4)
  out_BKGSh = _heads_first(query_BKGSh, key_BSKh.swapaxes(1, 2), value_BSKh.swapaxes(1, 2),
                           segments_BS)
  return out_BKGSh.transpose(0, 3, 1, 2, 4).reshape(query_BSHh.shape)


# Scores above the diagonal are not computed. Those below live for one part of the queries alone
# and are made again in the backward pass from the sums that are kept (as FlashAttention does,
# arXiv 2205.14135): on a CPU it is memory traffic and exponentials that cost, not products.


@jax.custom_vjp
def _heads_first(query_BKGSh, key_BKSh, value_BKSh, segments_BS):
  return _heads_first_fwd(query_BKGSh, key_BKSh, value_BKSh, segments_BS)[0]


def _heads_first_fwd(query_BKGSh, key_BKSh, value_BKSh, segments_BS):
  outs, lses = [], []
  for part in _parts(query_BKGSh.shape[3]):
    score_BKGQS = _scores(query_BKGSh, key_BKSh, segments_BS, part)
    max_BKGQ = score_BKGQS.max(-1)
    exp_BKGQS = jnp.exp(score_BKGQS - max_BKGQ[..., None])
    sum_BKGQ = exp_BKGQS.sum(-1)
    out_BKGQh = jnp.einsum("bkgqs,bksh->bkgqh", exp_BKGQS.astype(value_BKSh.dtype),
                           value_BKSh[:, :, :part.stop], preferred_element_type=jnp.float32)
    outs.append((out_BKGQh / sum_BKGQ[..., None]).astype(value_BKSh.dtype))
    lses.append(max_BKGQ + jnp.log(sum_BKGQ))
  out_BKGSh, lse_BKGS = jnp.concatenate(outs, axis=3), jnp.concatenate(lses, axis=3)
  return out_BKGSh, (query_BKGSh, key_BKSh, value_BKSh, segments_BS, out_BKGSh, lse_BKGS)


def _heads_first_bwd(residuals, dout_BKGSh):
  query_BKGSh, key_BKSh, value_BKSh, segments_BS, out_BKGSh, lse_BKGS = residuals
  einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
  dtype, seq_len = query_BKGSh.dtype, query_BKGSh.shape[3]
  # What the normalisation takes from the gradient of each row of scores.
  common_BKGS = (dout_BKGSh.astype(jnp.float32) * out_BKGSh.astype(jnp.float32)).sum(-1)
  dqueries, dkey_BKSh, dvalue_BKSh = [], 0.0, 0.0
  for part in _parts(seq_len):
    keys = slice(part.stop)
    prob_BKGQS = jnp.exp(_scores(query_BKGSh, key_BKSh, segments_BS, part)
                         - lse_BKGS[..., part, None])
    dout_BKGQh = dout_BKGSh[..., part, :]
    dprob_BKGQS = einsum("bkgqh,bksh->bkgqs", dout_BKGQh, value_BKSh[:, :, keys])
    dscore_BKGQS = (prob_BKGQS * (dprob_BKGQS - common_BKGS[..., part, None])
                    * _scale(query_BKGSh)).astype(dtype)
    dqueries.append(einsum("bkgqs,bksh->bkgqh", dscore_BKGQS, key_BKSh[:, :, keys]).astype(dtype))
    rest = ((0, 0), (0, 0), (0, seq_len - part.stop), (0, 0))
    dkey_BKSh += jnp.pad(einsum("bkgqs,bkgqh->bksh", dscore_BKGQS, query_BKGSh[..., part, :]),
                         rest)
    dvalue_BKSh += jnp.pad(einsum("bkgqs,bkgqh->bksh", prob_BKGQS.astype(dtype), dout_BKGQh),
                           rest)
  return jnp.concatenate(dqueries, axis=3), dkey_BKSh.astype(dtype), dvalue_BKSh.astype(dtype), None


_heads_first.defvjp(_heads_first_fwd, _heads_first_bwd)


def _parts(seq_len: int) -> list[slice]:
  rows = -(-seq_len // _CPU_BLOCKS)
  return [slice(start, min(start + rows, seq_len)) for start in range(0, seq_len, rows)]


def _scale(query_BKGSh) -> float:
  return query_BKGSh.shape[-1]**-0.5


def _scores(query_BKGSh, key_BKSh, segments_BS, part: slice):
  """Of the queries of a part and the keys up to its end; -inf where a key is not to be seen."""
  score_BKGQS = jnp.einsum("bkgqh,bksh->bkgqs", query_BKGSh[..., part, :],
                           key_BKSh[:, :, :part.stop], preferred_element_type=jnp.float32)
  seen = jnp.arange(part.stop) <= jnp.arange(part.start, part.stop)[:, None]
  if segments_BS is not None:
    same_BQS = segments_BS[:, part, None] == segments_BS[:, None, :part.stop]
    seen = (seen & same_BQS)[:, None, None]
  return jnp.where(seen, score_BKGQS * _scale(query_BKGSh), -jnp.inf)
