"""Grouped matrix products: rows sorted by expert, each expert's rows times its own matrix.

Only the work that there is, is done: the cost follows the rows in the groups, neither the
number of experts nor the size of the array that holds the rows.

Groups follow one another in the order of the experts, without gaps, and at least SPARE_ROWS
rows that belong to nobody follow the last. On TPU XLA's `ragged_dot` has a kernel for the
product of the rows. For the gradient of the matrices it has none there, and none at all on NVIDIA
GPUs (JAX 0.10.2): it would multiply every row for every expert. On GPUs bfloat16 has kernels of our
own (grouped_triton.py; JAX 0.11 announces that it will part with Triton, and one without it takes
what else there is); all else is a loop over blocks of rows of one expert each. On CPUs a whole
feed-forward layer is one such loop (swiglu_blocks.py).

For NVIDIA GPUs this is read in what XLA compiles for an H100, which need not be there: with
jax-cuda12-plugin and nvidia-cuda-nvcc-cu12 installed, JAX_PLATFORMS=cpu, autotuning off and

    jax.experimental.topologies.get_topology_desc(
        platform="cuda", topology="1x1x1", target_config=SPEC)

where SPEC is XLA's h100_sxm.txtpb without what this version does not read (rates of units).
`ragged_dot` of 8192 rows of bfloat16 and 64 matrices of [1024, 512] becomes one dense product,
[8192, 65536] times [65536, 512]: 64 times the FLOPs, and 1 GiB of temporary memory. Both
gradients are as dense, in 1.5 GiB; XLA's two experimental flags for `ragged_dot` changed nothing
there. Our kernels take no memory but their results, and the matrices once more, transposed for the
gradient of the rows; they multiply about half a block of each expert for nothing. ptxas says that
they use Hopper's products (wgmma), load ahead and spill no register. Nothing has been timed.
Pallas' `ragged_dot_mgpu`, which JAX brings as an example, is not used: it has no gradient, wants
tiles chosen by hand, unrolls a loop over the groups and imports JAX's test utilities.
"""

import functools
from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.products import precision_of

# Rows in a block of the loop. Not measured; a block must be worth reading and writing the sum of a
# matrix's gradient.
_BLOCK_ROWS = {"gpu": 256, "tpu": 512}

# So that the last block of a group may reach past the end of it.
SPARE_ROWS = max(_BLOCK_ROWS.values())


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def grouped_matmul(x_SD: jax.Array, w_EDF: jax.Array, size_E: jax.Array, platform: str,
                   usual_rows: int | None = None) -> jax.Array:
  """y_SF: the rows of group e times w_EDF[e]. Float32 is meant as it says.

  Args:
    x_SD: rows in the layout above; what stands after the last group counts for nothing.
    w_EDF: matrices, of the type of the rows; on a mesh, varying over the axes that the rows
      vary over.
    size_E: int32, rows in each group.
    platform: of the devices, `gpu` or `tpu`, which decides how it is done.
    usual_rows: how many rows there are in all groups on average, where x_SD has room for more;
      only plans read it.

  Returns:
    The products, in the type of the rows, each rounded once; what stands after the last group
    means nothing.
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
  """grouped_triton.py, where it suits and this version of JAX can import it."""
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
    n_used: how many there are; the arrays are longer, and what is behind them has no rows inside.
    rows: rows in a block.
    expert_J: whose they are.
    start_J: the first row.
    inside_J: rows that are the expert's; the others belong to those after it.
    n_experts: of how many experts.
  """

  n_used: jax.Array
  rows: int
  expert_J: jax.Array
  start_J: jax.Array
  inside_J: jax.Array
  n_experts: int


def blocks_of(n_rows: int, size_E: jax.Array, rows: int) -> Blocks:
  """The blocks of `rows` rows that cover the groups of an array of `n_rows`."""
  n_blocks_E = -(-size_E // rows)
  end_E = jnp.cumsum(n_blocks_E)
  j_J = jnp.arange(n_rows // rows + len(size_E))
  expert_J = jnp.searchsorted(end_E, j_J, side="right", method="scan_unrolled")
  expert_J = jnp.minimum(expert_J, len(size_E) - 1)
  done_J = (j_J - (end_E - n_blocks_E)[expert_J]) * rows
  start_J = (jnp.cumsum(size_E) - size_E)[expert_J] + done_J
  return Blocks(end_E[-1], rows, expert_J, start_J, size_E[expert_J] - done_J, len(size_E))


def _over_blocks(blocks: Blocks, usual_rows: int, body, start):
  """fori_loop over the blocks that are used; its scope tells plans how many there are on average:
  half a block of each expert is empty."""
  usual = -(-usual_rows // blocks.rows) + blocks.n_experts // 2
  with jax.named_scope(f"trips_{usual}"):
    return jax.lax.fori_loop(0, blocks.n_used, body, start)


def _each_block(x_SD, w_EDF, size_E, platform, usual_rows):
  """Multiplies each block with its expert's matrix."""
  blocks = blocks_of(x_SD.shape[0], size_E, _BLOCK_ROWS[platform])

  def multiply(j, y_SF):
    start, w_DF = blocks.start_J[j], w_EDF[blocks.expert_J[j]]
    x_RD = jax.lax.dynamic_slice_in_dim(x_SD, start, blocks.rows)
    y_RF = jnp.einsum("rd,df->rf", x_RD, w_DF, precision=precision_of(x_SD.dtype, platform))
    # Rows of the experts after this one are overwritten when their own blocks come, later.
    return jax.lax.dynamic_update_slice_in_dim(y_SF, y_RF, start, axis=0)

  zeros_SF = jnp.zeros_like(x_SD, shape=(x_SD.shape[0], w_EDF.shape[2]))
  return _over_blocks(blocks, usual_rows or x_SD.shape[0], multiply, zeros_SF)


def _sum_of_outer_products(x_SD, dy_SF, size_E, platform, usual_rows):
  """dw_EDF, summed over an expert's rows in float32."""
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
