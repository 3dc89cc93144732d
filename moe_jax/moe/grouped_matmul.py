"""Grouped matrix products: rows sorted by expert, each expert's rows times its own matrix.

The cost scales with the rows in the groups, not with the number of experts or the length of the
array that holds the rows.

Layout: groups are contiguous, in expert order, and the last is followed by at least SPARE_ROWS
rows that belong to no group. On TPU, XLA's `ragged_dot` has a kernel for the product of the rows.
It has none for the gradient of the matrices, and none at all on NVIDIA GPUs (JAX 0.10.2): there it
would multiply every row by every expert. On GPUs, bfloat16 has its own kernels (grouped_triton.py;
JAX 0.11 announces the removal of Triton, without which the loop takes over); everything else is a
loop over blocks of rows, each of one expert. On CPUs, a whole feed-forward layer is one such loop
(swiglu_blocks.py).

The statements about NVIDIA GPUs come from what XLA compiles for an H100, which needs no GPU: with
jax-cuda12-plugin and nvidia-cuda-nvcc-cu12 installed, JAX_PLATFORMS=cpu, autotuning off and

    jax.experimental.topologies.get_topology_desc(
        platform="cuda", topology="1x1x1", target_config=SPEC)

where SPEC is XLA's h100_sxm.txtpb without the fields that this version does not parse (unit rates).
`ragged_dot` of 8192 bfloat16 rows and 64 matrices of [1024, 512] becomes one dense product,
[8192, 65536] times [65536, 512]: 64 times the FLOPs, and 1 GiB of temporary memory. Both
gradients are dense too, in 1.5 GiB; XLA's two experimental flags for `ragged_dot` change nothing
here. Our kernels need no memory beyond their results and, for the gradient of the rows, a
transposed copy of the matrices; they waste about half a block of work per expert. According to
ptxas they use Hopper's wgmma, pipeline their loads and spill no registers. Nothing has been timed.
Pallas' `ragged_dot_mgpu`, an example in JAX, is not used: it has no gradient, needs hand-picked
tile sizes, unrolls a loop over the groups and imports JAX's test utilities.
"""

import functools
from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.products import precision_of

# Rows per block of the loop. Not measured; a block must be large enough to amortize reading and
# writing the gradient of one expert's matrix.
_BLOCK_ROWS = {"gpu": 256, "tpu": 512}

# Padding, so that the last block may extend past the last group.
SPARE_ROWS = max(_BLOCK_ROWS.values())


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def grouped_matmul(x_SD: jax.Array, w_EDF: jax.Array, size_E: jax.Array, platform: str,
                   usual_rows: int | None = None) -> jax.Array:
  """y_SF: the rows of group e times w_EDF[e]. Float32 products have full precision.

  Args:
    x_SD: rows in the layout above; rows after the last group are ignored.
    w_EDF: matrices, of the dtype of the rows; inside shard_map, varying over the same mesh axes
      as the rows.
    size_E: int32, number of rows in each group.
    platform: of the devices, `gpu` or `tpu`; selects the implementation.
    usual_rows: average number of rows in all groups together, if x_SD has room for more; used
      only by the planner.

  Returns:
    The products, in the dtype of the rows, each rounded once; rows after the last group are
    undefined.
  """
  if platform == "tpu":
    return jax.lax.ragged_dot(x_SD, w_EDF, size_E, precision=precision_of(x_SD.dtype, platform))
  if (kernels := _kernels(x_SD, platform)) is not None:
    blocks = blocks_of(x_SD.shape[0], size_E, kernels.ROWS)
    return kernels.multiply_rows(x_SD, w_EDF, blocks.expert_J, blocks.start_J, blocks.inside_J)
  return _each_block(x_SD, w_EDF, size_E, platform, usual_rows)


def _grouped_matmul_fwd(x_SD, w_EDF, size_E, platform, usual_rows):
  return grouped_matmul(x_SD, w_EDF, size_E, platform, usual_rows), (x_SD, w_EDF, size_E)


def _grouped_matmul_bwd(platform, usual_rows, residuals, dy_SF):
  x_SD, w_EDF, size_E = residuals
  dx_SD = grouped_matmul(dy_SF, w_EDF.swapaxes(1, 2), size_E, platform, usual_rows)
  if (kernels := _kernels(x_SD, platform)) is not None:
    return dx_SD, kernels.sum_of_outer_products(x_SD, dy_SF, size_E), None
  return dx_SD, _sum_of_outer_products(x_SD, dy_SF, size_E, platform, usual_rows), None


grouped_matmul.defvjp(_grouped_matmul_fwd, _grouped_matmul_bwd)


def _kernels(x_SD: jax.Array, platform: str) -> ModuleType | None:
  """The module grouped_triton.py, if it applies and this version of JAX can import it."""
  if platform != "gpu" or x_SD.dtype != jnp.bfloat16:
    return None
  try:
    from moe_jax.moe import grouped_triton
  except ImportError:
    return None
  return grouped_triton


class Blocks(NamedTuple):
  """J blocks, each of one expert's rows.

  Attributes:
    n_used: number of blocks in use; the arrays are padded, and inside_J is <= 0 in the padding.
    rows: rows per block.
    expert_J: the expert of each block.
    start_J: the first row of each block.
    inside_J: number of the expert's rows from start_J on; if below `rows`, the rest of the block
      belongs to later experts.
    n_experts: number of experts.
  """

  n_used: jax.Array
  rows: int
  expert_J: jax.Array
  start_J: jax.Array
  inside_J: jax.Array
  n_experts: int


def blocks_of(n_rows: int, size_E: jax.Array, rows: int) -> Blocks:
  """Covers the groups of an array of `n_rows` rows with blocks of `rows` rows."""
  n_blocks_E = -(-size_E // rows)
  end_E = jnp.cumsum(n_blocks_E)
  j_J = jnp.arange(n_rows // rows + len(size_E))
  expert_J = jnp.searchsorted(end_E, j_J, side="right", method="scan_unrolled")
  expert_J = jnp.minimum(expert_J, len(size_E) - 1)
  done_J = (j_J - (end_E - n_blocks_E)[expert_J]) * rows
  start_J = (jnp.cumsum(size_E) - size_E)[expert_J] + done_J
  return Blocks(end_E[-1], rows, expert_J, start_J, size_E[expert_J] - done_J, len(size_E))


def _over_blocks(blocks: Blocks, usual_rows: int, body, start):
  """Runs a fori_loop over the used blocks.

  The loop's scope gives the planner the average trip count: half a block per expert is empty.
  """
  usual = -(-usual_rows // blocks.rows) + blocks.n_experts // 2
  with jax.named_scope(f"trips_{usual}"):
    return jax.lax.fori_loop(0, blocks.n_used, body, start)


def _each_block(x_SD, w_EDF, size_E, platform, usual_rows):
  """Multiplies each block by its expert's matrix."""
  blocks = blocks_of(x_SD.shape[0], size_E, _BLOCK_ROWS[platform])

  def multiply(j, y_SF):
    start, w_DF = blocks.start_J[j], w_EDF[blocks.expert_J[j]]
    x_RD = jax.lax.dynamic_slice_in_dim(x_SD, start, blocks.rows)
    y_RF = jnp.einsum("rd,df->rf", x_RD, w_DF, precision=precision_of(x_SD.dtype, platform))
    # The block's rows of later experts are overwritten by their own blocks.
    return jax.lax.dynamic_update_slice_in_dim(y_SF, y_RF, start, axis=0)

  zeros_SF = jnp.zeros_like(x_SD, shape=(x_SD.shape[0], w_EDF.shape[2]))
  return _over_blocks(blocks, usual_rows or x_SD.shape[0], multiply, zeros_SF)


def _sum_of_outer_products(x_SD, dy_SF, size_E, platform, usual_rows):
  """dw_EDF, summed over each expert's rows in float32."""
  blocks = blocks_of(x_SD.shape[0], size_E, _BLOCK_ROWS[platform])

  def add(j, dw_EDF):
    inside_R1 = (jnp.arange(blocks.rows) < blocks.inside_J[j])[:, None]
    x_RD, dy_RF = (
        jnp.where(inside_R1, jax.lax.dynamic_slice_in_dim(x, blocks.start_J[j], blocks.rows), 0)
        for x in (x_SD, dy_SF))
    dw_DF = jnp.einsum("rd,rf->df", x_RD, dy_RF, precision=precision_of(x_SD.dtype, platform),
                       preferred_element_type=jnp.float32)
    return dw_EDF.at[blocks.expert_J[j]].add(dw_DF)

  shape = (size_E.shape[0], x_SD.shape[1], dy_SF.shape[1])
  zeros_EDF = jnp.zeros_like(x_SD, shape=shape, dtype=jnp.float32)
  dw_EDF = _over_blocks(blocks, usual_rows or x_SD.shape[0], add, zeros_EDF)
  return dw_EDF.astype(x_SD.dtype)
