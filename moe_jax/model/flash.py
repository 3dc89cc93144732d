"""Flash attention on GPUs: JAX's Pallas Triton kernel, which never materializes the scores.

cuDNN's kernel is known to be faster, but JAX 0.10.2 can pass it document boundaries only as a
[B, 1, S, S] mask, whose gradient is computed needlessly and which fails under `jax.vmap`, as used
for populations. This kernel compares document numbers tile by tile. No attention has been timed on
a GPU yet; `python -m benchmarks.attention` would do it.

JAX 0.11 announces the removal of Triton; without it, attention falls back to the plain one.
"""

import functools
from types import ModuleType

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from moe_jax.mesh import BATCH_AXES

_TILE = 128  # queries and keys per tile of the forward pass
_MOST_WIDTH = 128  # of a head, so that tiles fit into shared memory
_LEAST_WIDTH = 16  # of a head: tensor cores do not support narrower products


@functools.cache
def kernel() -> ModuleType | None:
  """The module of JAX's kernel, or None if this version has none. Imported only on GPUs."""
  try:
    from jax.experimental.pallas.ops.gpu import attention
  except ImportError:
    return None
  return attention


def suits(query_BSHh: jax.Array) -> bool:
  """Whether the kernel supports these queries: whole tiles, bfloat16, a suitable head width."""
  _, seq_len, _, h = query_BSHh.shape
  return (seq_len % _TILE == 0 and _LEAST_WIDTH <= h <= _MOST_WIDTH
          and query_BSHh.dtype == jnp.bfloat16 and kernel() is not None)


def flash_attention(query_BSHh: jax.Array, key_BSKh: jax.Array, value_BSKh: jax.Array,
                    segments_BS: jax.Array | None, mesh: Mesh,
                    interpret: bool = False) -> jax.Array:
  """out_BSHh: causal attention within segments; for the arguments see splash_attention."""
  sharded = P(BATCH_AXES)

  @functools.partial(jax.shard_map, mesh=mesh, check_vma=False, out_specs=sharded,
                     in_specs=(sharded,) * 4)
  def on_device(query_bSHh, key_bSKh, value_bSKh, segments_bS):
    group = query_bSHh.shape[2] // key_bSKh.shape[2]
    key_bSHh, value_bSHh = (jnp.repeat(x, group, axis=2) for x in (key_bSKh, value_bSKh))
    return kernel().mha(query_bSHh, key_bSHh, value_bSHh, segments_bS,
                        sm_scale=query_bSHh.shape[3]**-0.5, causal=True, interpret=interpret)

  return on_device(query_BSHh, key_BSKh, value_BSKh, segments_BS)
