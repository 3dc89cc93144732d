"""Cross-entropy of the output head, without materializing the logits of the whole batch.

The head is the widest matrix of a small model: the float32 logits of a batch are often larger
than all its other activations together. Here they exist for one chunk of tokens at a time. Given
the logits, the gradients of a sum of losses are known up to one scalar factor, so training
computes them in the forward pass: each chunk's logits are computed once, and nothing of their size
is saved for the backward pass (the idea is Liger Kernel's, arXiv 2410.10989, section 3.2).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from moe_jax.mesh import BATCH_AXES, platform_of
from moe_jax.products import einsum, precision_of

# Bytes of float32 logits per chunk and device. On a CPU they should fit into the cache; a matrix
# unit needs many rows, and each chunk reads and writes the whole gradient of the head.
_CHUNK_BYTES = {"cpu": 2**24}
_CHUNK_BYTES_ACCELERATOR = 2**29


def summed_nll(x_BSD: jax.Array, head_DV: jax.Array, targets_BS: jax.Array,
               mesh: Mesh) -> jax.Array:
  """Sum over all tokens of -log softmax(x head)[target], in nats, float32.

  Args:
    x_BSD: outputs of the decoder, B split over all mesh axes.
    head_DV: output head, replicated, of the dtype of the outputs.
    targets_BS: int32.
    mesh: where it runs.
  """

  def on_device(x_bSD, head_DV, targets_bS):
    head_DV = jax.lax.pcast(head_DV, BATCH_AXES, to="varying")
    chunks = _chunks(x_bSD, targets_bS, head_DV.shape[1], mesh)
    return jax.lax.psum(_summed(chunks, head_DV, _precision(head_DV, mesh)), BATCH_AXES)

  return jax.shard_map(on_device, mesh=mesh, in_specs=(P(BATCH_AXES), P(), P(BATCH_AXES)),
                       out_specs=P())(x_BSD, head_DV, targets_BS)


def token_scores(x_BSD: jax.Array, head_DV: jax.Array, targets_BS: jax.Array,
                 mesh: Mesh) -> tuple[jax.Array, jax.Array]:
  """Returns each token's loss and whether it is the argmax; for evaluation, without gradients.

  The losses nll_BS, in float32, are the terms that `summed_nll` sums. greedy_BS is bool: whether
  the target is the most likely token.
  """

  def on_device(x_bSD, head_DV, targets_bS):
    chunks = _chunks(x_bSD, targets_bS, head_DV.shape[1], mesh)

    def of_chunk(chunk):
      nll_R, exp_RV, _ = _nll(*chunk, head_DV, _precision(head_DV, mesh))
      return nll_R, exp_RV.argmax(-1) == chunk.target_NR

    return jax.tree.map(lambda found_NR: found_NR.ravel()[:targets_bS.size].reshape(
        targets_bS.shape), jax.lax.map(of_chunk, chunks))

  return jax.shard_map(on_device, mesh=mesh, in_specs=(P(BATCH_AXES), P(), P(BATCH_AXES)),
                       out_specs=P(BATCH_AXES))(x_BSD, head_DV, targets_BS)


class _Chunks(NamedTuple):
  """N chunks of R tokens; a target of -1 marks the padding after the last token."""

  x_NRD: jax.Array
  target_NR: jax.Array


def _chunks(x_bSD: jax.Array, targets_bS: jax.Array, vocab_size: int, mesh: Mesh) -> _Chunks:
  n_tokens = targets_bS.size
  limit = _CHUNK_BYTES.get(platform_of(mesh), _CHUNK_BYTES_ACCELERATOR)
  least = -(-n_tokens * vocab_size * 4 // limit)
  # Up to twice as many chunks if these divide the tokens evenly: then no padding copies them.
  n_chunks = next((n for n in range(least, 2 * least) if n_tokens % n == 0), least)
  rows = -(-n_tokens // n_chunks)
  spare = n_chunks * rows - n_tokens
  x_TD = jnp.pad(x_bSD.reshape(n_tokens, -1), ((0, spare), (0, 0)))
  target_T = jnp.pad(targets_bS.ravel(), (0, spare), constant_values=-1)
  return _Chunks(x_TD.reshape(n_chunks, rows, -1), target_T.reshape(n_chunks, rows))


def _precision(head_DV, mesh):
  return precision_of(head_DV.dtype, platform_of(mesh))


def _nll(x_RD, target_R, head_DV, precision):
  """nll_R, 0 for padding, and the exponentials and their sum, for the gradient."""
  logit_RV = einsum("rd,dv->rv", x_RD, head_DV, precision=precision)
  max_R = logit_RV.max(-1)
  exp_RV = jnp.exp(logit_RV - max_R[:, None])
  sum_R = exp_RV.sum(-1)
  own_R = jnp.take_along_axis(logit_RV, jnp.maximum(target_R, 0)[:, None], axis=-1)[:, 0]
  nll_R = jnp.where(target_R >= 0, jnp.log(sum_R) + max_R - own_R, 0)
  return nll_R, exp_RV, sum_R


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _summed(chunks: _Chunks, head_DV: jax.Array, precision: jax.lax.Precision | None) -> jax.Array:
  return jax.lax.map(lambda chunk: _nll(*chunk, head_DV, precision)[0].sum(), chunks).sum()


def _summed_fwd(chunks, head_DV, precision):
  # Transposed once, since a CPU multiplies faster without transposed factors.
  head_VD, x_NDR = head_DV.T, chunks.x_NRD.swapaxes(1, 2)
  multiply = functools.partial(einsum, precision=precision)

  def step(sums, chunk):
    total, dhead_DV = sums
    (x_RD, target_R), x_DR = chunk
    nll_R, exp_RV, sum_R = _nll(x_RD, target_R, head_DV, precision)
    hot_RV = jnp.arange(head_DV.shape[1]) == target_R[:, None]
    weight_R = jnp.where(target_R >= 0, 1 / sum_R, 0)
    dlogit_RV = (exp_RV * weight_R[:, None] - hot_RV).astype(x_RD.dtype)
    dx_RD = multiply("rv,vd->rd", dlogit_RV, head_VD).astype(x_RD.dtype)
    dhead_DV += multiply("dr,rv->dv", x_DR, dlogit_RV)
    return (total + nll_R.sum(), dhead_DV), dx_RD

  zeros_DV = jnp.zeros_like(head_DV, dtype=jnp.float32)
  start = jnp.zeros_like(chunks.x_NRD, shape=(), dtype=jnp.float32)
  (total, dhead_DV), dx_NRD = jax.lax.scan(step, (start, zeros_DV), (chunks, x_NDR))
  return total, (dx_NRD, dhead_DV, jnp.zeros_like(head_DV, shape=()))


def _summed_bwd(_precision, residuals, dtotal):
  dx_NRD, dhead_DV, like = residuals
  scaled = (dtotal * dx_NRD.astype(jnp.float32)).astype(dx_NRD.dtype)
  return _Chunks(scaled, None), (dtotal * dhead_DV).astype(like.dtype)


_summed.defvjp(_summed_fwd, _summed_bwd)
