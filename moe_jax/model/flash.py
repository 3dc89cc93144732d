"""Flash attention on GPUs: JAX's Pallas kernel (Triton), which never holds the scores.

cuDNN's kernel is known to be faster, but what JAX 0.10.2 lets through to it of documents does not
do here: a mask [B, 1, S, S], whose gradient is computed for nothing, and which does not pass under
`jax.vmap`, which a population is. Here documents' numbers are compared tile by tile. No attention
has been timed on a GPU yet: `python -m benchmarks.attention` is what does it.

JAX 0.11 announces that it will part with Triton; a JAX without it has plain attention here.
"""

import functools
from types import ModuleType

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from moe_jax.mesh import BATCH_AXES

_TILE = 128  # queries and keys in a tile of the forward pass
_MOST_WIDTH = 128  # of a head, so that tiles fit into the memory of a multiprocessor
_LEAST_WIDTH = 16  # narrower products do not go by tensor cores


@functools.cache
def kernel() -> ModuleType | None:
  """JAX's module of it, where this version has one. Nothing but a GPU has it imported."""
  try:
    from jax.experimental.pallas.ops.gpu import attention
  except ImportError:
    return None
  return attention


def suits(query_BSHh: jax.Array) -> bool:
  """Whether the kernel takes them: whole tiles, and a type that it multiplies as it says."""
  _, seq_len, _, h = query_BSHh.shape
  return (seq_len % _TILE == 0 and _LEAST_WIDTH <= h <= _MOST_WIDTH
          and query_BSHh.dtype == jnp.bfloat16 and kernel() is not None)


def flash_attention(query_BSHh: jax.Array, key_BSKh: jax.Array, value_BSKh: jax.Array,
                    segments_BS: jax.Array | None, mesh: Mesh,
                    interpret: bool = False) -> jax.Array:
  """Causal attention within segments, out_BSHh: arguments and result of splash.splash_attention."""
  sharded = P(BATCH_AXES)

  @functools.partial(jax.shard_map, mesh=mesh, check_vma=False, out_specs=sharded,
                     in_specs=(sharded,) * 4)
  def on_device(query_bSHh, key_bSKh, value_bSKh, segments_bS):
    group = query_bSHh.shape[2] // key_bSKh.shape[2]
    key_bSHh, value_bSHh = (jnp.repeat(x, group, axis=2) for x in (key_bSKh, value_bSKh))
    return kernel().mha(query_bSHh, key_bSHh, value_bSHh, segments_bS,
                        sm_scale=query_bSHh.shape[3]**-0.5, causal=True, interpret=interpret)

  return on_device(query_BSHh, key_BSKh, value_BSKh, segments_BS)
