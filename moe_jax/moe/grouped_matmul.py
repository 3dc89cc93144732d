"""Grouped matrix products: rows sorted by expert, each expert's rows times its own matrix.

Only the work that there is, is done: the cost follows the rows in the groups, neither the
number of experts nor the size of the array that holds the rows.

The layout of the rows suits the platform. Groups follow one another in the order of the
experts and each begins at a multiple of `block`, the rows that fill its last block being zero.
On TPU `block` is 1 and XLA's own `ragged_dot` multiplies. Elsewhere `ragged_dot` of the
released versions multiplies every row with every expert's matrix (JAX 0.10.2: on CPU by its
lowering, on NVIDIA GPUs because no kernel takes it), so that there each block, which has one
expert, is multiplied by itself in a loop.
"""

import functools

import jax
import jax.numpy as jnp

# CPU: from 32 to 128 it makes no difference that stands out. GPU: not measured; a block must
# be worth the start of its kernels.
_BLOCK_ROWS = {"tpu": 1, "cpu": 64, "gpu": 256}


def block_rows(platform: str) -> int:
  """Rows in a block on devices of this platform (`jax.Device.platform`)."""
  return _BLOCK_ROWS.get(platform, 64)


def n_block_rows(n_rows: int, n_groups: int, block: int) -> int:
  """Rows that `n_rows` need in `n_groups` groups laid out in blocks, whatever the sizes."""
  return (n_rows + min(n_rows, n_groups) * (block - 1)) // block * block


def group_starts(size_E: jax.Array, block: int) -> jax.Array:
  """start_E: the first row of each group. Leading axes are kept."""
  padded_E = -(-size_E // block) * block
  return jnp.cumsum(padded_E, axis=-1) - padded_E


def experts_of_blocks(size_E: jax.Array, n_blocks: int, block: int) -> jax.Array:
  """expert_J: whose rows each block holds; the number of experts in blocks not in use."""
  end_E = jnp.cumsum(-(-size_E // block))
  return jnp.searchsorted(end_E, jnp.arange(n_blocks), side="right").astype(jnp.int32)


def grouped_matmul(x_SD: jax.Array, w_EDF: jax.Array, size_E: jax.Array,
                   platform: str) -> jax.Array:
  """y_SF: the rows of group e times w_EDF[e]. Float32 is meant as it says.

  Args:
    x_SD: rows in the layout above; what stands after the last group counts for nothing.
    w_EDF: matrices, of the type of the rows; on a mesh, varying over the axes that the rows
      vary over.
    size_E: int32, rows in each group without those that fill its last block.
    platform: of the devices, which decides the layout and how it is multiplied.

  Returns:
    The products, in the type of the rows, each rounded once; what stands after the last group
    means nothing.
  """
  if block_rows(platform) == 1:
    return jax.lax.ragged_dot(x_SD, w_EDF, size_E, precision=_precision(x_SD.dtype))
  return _block_matmul(x_SD, w_EDF, size_E, platform)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _block_matmul(x_SD, w_EDF, size_E, platform):
  return _each_block("rd,df->rf", x_SD, w_EDF, size_E, platform)


def _block_matmul_fwd(x_SD, w_EDF, size_E, platform):
  return _block_matmul(x_SD, w_EDF, size_E, platform), (x_SD, w_EDF, size_E)


def _block_matmul_bwd(platform, residuals, dy_SF):
  x_SD, w_EDF, size_E = residuals
  dx_SD = _each_block("rf,df->rd", dy_SF, w_EDF, size_E, platform)
  return dx_SD, _sum_of_outer_products(x_SD, dy_SF, w_EDF, size_E, platform), None


_block_matmul.defvjp(_block_matmul_fwd, _block_matmul_bwd)


def _each_block(contraction, x_SD, w_EDF, size_E, platform):
  """Multiplies each block in use with its expert's matrix; zeros in the others."""
  block = block_rows(platform)
  expert_J, n_used = _used_blocks(x_SD, size_E, block)
  dtype, (x_SD, w_EDF) = x_SD.dtype, _in_loop_type(platform, x_SD, w_EDF)
  width = w_EDF.shape["edf".index(contraction[-1])]

  def multiply(j, y_SF):
    y_RF = jnp.einsum(contraction, _block(x_SD, j, block), w_EDF[expert_J[j]],
                      precision=_precision(x_SD.dtype))
    return jax.lax.dynamic_update_slice_in_dim(y_SF, y_RF, j * block, axis=0)

  zeros_SF = jnp.zeros_like(x_SD, shape=(x_SD.shape[0], width))
  return jax.lax.fori_loop(0, n_used, multiply, zeros_SF).astype(dtype)


def _sum_of_outer_products(x_SD, dy_SF, w_EDF, size_E, platform):
  """dw_EDF, summed over an expert's rows in float32."""
  block = block_rows(platform)
  expert_J, n_used = _used_blocks(x_SD, size_E, block)
  x_SD, dy_SF = _in_loop_type(platform, x_SD, dy_SF)

  def add(j, dw_EDF):
    return dw_EDF.at[expert_J[j]].add(jnp.einsum(
        "rd,rf->df", _block(x_SD, j, block), _block(dy_SF, j, block),
        precision=_precision(x_SD.dtype), preferred_element_type=jnp.float32))

  zeros_EDF = jnp.zeros_like(x_SD, shape=w_EDF.shape, dtype=jnp.float32)
  return jax.lax.fori_loop(0, n_used, add, zeros_EDF).astype(w_EDF.dtype)


def _in_loop_type(platform, *arrays):
  # XLA's CPU compiler does everything in float32 and converts before and after. In a loop that
  # would be the whole array each time round.
  return [x.astype(jnp.float32) for x in arrays] if platform == "cpu" else arrays


def _used_blocks(x_SD, size_E, block):
  """Whose rows each block holds, and how many blocks are in use."""
  expert_J = experts_of_blocks(size_E, x_SD.shape[0] // block, block)
  return expert_J, (-(-size_E // block)).sum()


def _block(x_SD, j, block):
  return jax.lax.dynamic_slice_in_dim(x_SD, j * block, block)


def _precision(dtype):
  return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
