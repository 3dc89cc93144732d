"""Embedding lookup whose gradient accumulates in float32.

A frequent token occurs thousands of times in a batch. The gradient of plain indexing accumulates
in the dtype of the table, and a bfloat16 sum stagnates: after 256 equal terms, the next one is
rounded away.
"""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from moe_jax.mesh import BATCH_AXES


def look_up(embedding_VD: jax.Array, token_BS: jax.Array, mesh: Mesh) -> jax.Array:
  """x_BSD: the embedding of each token.

  Each device sums the gradients of its own tokens in float32 and rounds once; the sum over devices
  is in the dtype of the table, as for all weights.

  Args:
    embedding_VD: replicated, in the dtype of the activations.
    token_BS: int32, B split over all mesh axes.
    mesh: where it runs.
  """

  def on_device(embedding_VD, token_bS):
    return _rows(jax.lax.pcast(embedding_VD, BATCH_AXES, to="varying"), token_bS)

  return jax.shard_map(on_device, mesh=mesh, in_specs=(P(), P(BATCH_AXES)),
                       out_specs=P(BATCH_AXES))(embedding_VD, token_BS)


@jax.custom_vjp
def _rows(embedding_VD, token_bS):
  return embedding_VD[token_bS]


def _fwd(embedding_VD, token_bS):
  like_V0 = jnp.zeros_like(embedding_VD, shape=(embedding_VD.shape[0], 0))
  return _rows(embedding_VD, token_bS), (token_bS, like_V0)


def _bwd(residuals, dx_bSD):
  token_bS, like_V0 = residuals
  shape_VD = (like_V0.shape[0], dx_bSD.shape[-1])
  zeros_VD = jnp.zeros_like(dx_bSD, shape=shape_VD, dtype=jnp.float32)
  dembedding_VD = zeros_VD.at[token_bS].add(dx_bSD.astype(jnp.float32))
  return dembedding_VD.astype(like_V0.dtype), None


_rows.defvjp(_fwd, _bwd)
