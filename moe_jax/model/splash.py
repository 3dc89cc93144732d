"""Splash attention: JAX's Pallas kernel for TPUs, which never materializes all scores.

Plain attention writes [heads, S, S] scores to memory and reads them back, forward and backward;
the kernel keeps one tile on chip at a time and skips tiles that the causal mask empties.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from moe_jax.mesh import BATCH_AXES

SAVED = "attention"  # checkpoint_name of the kernel's residuals, for remat policies
LANES = 128  # of a TPU's vector unit; tiles are a multiple of it
_TILE = 512  # maximum number of queries and keys per tile


def suits(query_BSHh: jax.Array) -> bool:
  """Whether the kernel supports these queries: whole tiles, bfloat16."""
  return query_BSHh.shape[1] % LANES == 0 and query_BSHh.dtype == jnp.bfloat16


def splash_attention(query_BSHh: jax.Array, key_BSKh: jax.Array, value_BSKh: jax.Array,
                     segments_BS: jax.Array | None, mesh: Mesh,
                     interpret: bool = False) -> jax.Array:
  """out_BSHh: causal attention within segments.

  Args:
    query_BSHh: H query heads, a multiple of the K key heads; B split over the whole mesh.
    key_BSKh: keys.
    value_BSKh: values.
    segments_BS: int32, the segment of each position; None for a single segment.
    mesh: where it runs.
    interpret: run the kernel in Pallas' interpreter on any device, for tests.
  """
  seq_len, n_heads, h = query_BSHh.shape[1:]
  # The kernel does not scale scores. In float32, so that the scale itself is not rounded.
  query_BSHh = (query_BSHh.astype(jnp.float32) * h**-0.5).astype(query_BSHh.dtype)
  kernel = _kernel(seq_len, n_heads, interpret)
  sharded = P(BATCH_AXES)

  @functools.partial(jax.shard_map, mesh=mesh, check_vma=False, out_specs=sharded,
                     in_specs=(sharded, sharded, sharded, sharded))
  def on_device(query_bSHh, key_bSKh, value_bSKh, segments_bS):
    # Heads are padded to whole lanes. The zeros add nothing to scores and are cut off at the end.
    heads_first = (jnp.pad(jnp.swapaxes(x, 1, 2), ((0, 0),) * 3 + ((0, -h % LANES),))
                   for x in (query_bSHh, key_bSKh, value_bSKh))
    segments = None if segments_bS is None else splash.SegmentIds(segments_bS, segments_bS)
    return jnp.swapaxes(jax.vmap(kernel)(*heads_first, segments)[..., :h], 1, 2)

  return on_device(query_BSHh, key_BSKh, value_BSKh, segments_BS)


@functools.lru_cache(maxsize=8)
def _kernel(seq_len: int, n_heads: int, interpret: bool):
  """The kernel for one sequence: [H, S, h] queries, [K, S, h] keys and values."""
  tile = max(size for size in range(LANES, _TILE + 1, LANES) if seq_len % size == 0)
  sizes = splash.BlockSizes(
      block_q=tile, block_kv=tile, block_kv_compute=tile, block_q_dkv=tile, block_kv_dkv=tile,
      block_kv_dkv_compute=tile, block_q_dq=tile, block_kv_dq=tile)
  mask = splash.MultiHeadMask([splash.CausalMask((seq_len, seq_len))] * n_heads)
  with jax.ensure_compile_time_eval():  # the cached kernel outlives the trace that first builds it
    return splash.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1,
                                  residual_checkpoint_name=SAVED, interpret=interpret)
