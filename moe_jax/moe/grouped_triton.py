"""Grouped matrix products on GPUs: Pallas Triton kernels for the rows and the matrices' gradient.

Where grouped_matmul.py loops over blocks of rows sequentially, these kernels run a parallel grid,
one program per block and tile of columns. They have been compiled for an H100, but not run on one,
let alone timed.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

ROWS = 128  # in a block
_COLUMNS = 128
_INNER = 64
_COMPILER = triton.CompilerParams(num_warps=8, num_stages=3)


def multiply_rows(x_SD: jax.Array, w_EDF: jax.Array, expert_J: jax.Array, start_J: jax.Array,
                  inside_J: jax.Array, interpret: bool = False) -> jax.Array:
  """y_SF: rows start_J .. start_J + inside_J of each of J blocks, times w_EDF[expert_J].

  Args:
    x_SD: rows, of a dtype that GPUs multiply without rounding (bfloat16).
    w_EDF: matrices, of the dtype of the rows.
    expert_J, start_J, inside_J: blocks of ROWS rows, see grouped_matmul.Blocks; inside_J <= 0
      marks an unused block.
    interpret: run the kernel in Pallas' interpreter on any device, for tests.

  Returns:
    The products, in the dtype of the rows; rows in no block are 0.
  """
  (n_rows, d), f = x_SD.shape, w_EDF.shape[2]

  def kernel(expert_J, start_J, inside_J, x_SD, w_EDF, zeros_SF, y_SF):
    del zeros_SF  # aliased to y_SF, which it initializes
    j = pl.program_id(0)
    row_R, column_F = jnp.arange(ROWS), pl.program_id(1) * _COLUMNS + jnp.arange(_COLUMNS)
    expert, start, inside = expert_J[j], start_J[j], inside_J[j]
    inside_R, inside_F = row_R < inside, column_F < f

    def add(i, sum_RF):
      inner_I = i * _INNER + jnp.arange(_INNER)
      x_RI = _load(x_SD, (), start + row_R, inner_I, inside_R, inner_I < d)
      w_IF = _load(w_EDF, (expert,), inner_I, column_F, inner_I < d, inside_F)
      return sum_RF + triton.dot(x_RI, w_IF)

    steps = (inside > 0).astype(jnp.int32) * pl.cdiv(d, _INNER)
    y_RF = jax.lax.fori_loop(0, steps, add, jnp.zeros((ROWS, _COLUMNS), jnp.float32))
    triton.store(y_SF.at[(start + row_R)[:, None], column_F[None, :]], y_RF.astype(y_SF.dtype),
                 mask=inside_R[:, None] & inside_F[None, :])

  zeros_SF = jnp.zeros_like(x_SD, shape=(n_rows, f))
  return pl.pallas_call(
      kernel, grid=(len(expert_J), pl.cdiv(f, _COLUMNS)),
      out_shape=jax.ShapeDtypeStruct.like(zeros_SF), input_output_aliases={5: 0},
      compiler_params=_COMPILER, interpret=interpret,
      name="grouped_rows")(expert_J, start_J, inside_J, x_SD, w_EDF, zeros_SF)


def sum_of_outer_products(x_SD: jax.Array, y_SF: jax.Array, size_E: jax.Array,
                          interpret: bool = False) -> jax.Array:
  """w_EDF: the sum of x^T y over each expert's rows, in float32, rounded to the dtype of the rows.

  Args:
    x_SD, y_SF: rows of the same dtype, sorted by expert.
    size_E: int32, number of rows of each expert.
    interpret: as for multiply_rows.
  """
  d, f, e = x_SD.shape[1], y_SF.shape[1], len(size_E)

  def kernel(first_E, size_E, x_SD, y_SF, w_EDF):
    expert = pl.program_id(0)
    column_D = pl.program_id(1) * _COLUMNS + jnp.arange(_COLUMNS)
    column_F = pl.program_id(2) * _COLUMNS + jnp.arange(_COLUMNS)
    first, size = first_E[expert], size_E[expert]

    def add(i, sum_DF):
      row_I = i * _INNER + jnp.arange(_INNER)
      x_ID = _load(x_SD, (), first + row_I, column_D, row_I < size, column_D < d)
      y_IF = _load(y_SF, (), first + row_I, column_F, row_I < size, column_F < f)
      return sum_DF + triton.dot(x_ID, y_IF, trans_a=True)

    w_DF = jax.lax.fori_loop(0, pl.cdiv(size, _INNER), add,
                             jnp.zeros((_COLUMNS, _COLUMNS), jnp.float32))
    triton.store(w_EDF.at[expert, column_D[:, None], column_F[None, :]], w_DF.astype(w_EDF.dtype),
                 mask=(column_D < d)[:, None] & (column_F < f)[None, :])

  return pl.pallas_call(
      kernel, grid=(e, pl.cdiv(d, _COLUMNS), pl.cdiv(f, _COLUMNS)),
      out_shape=jax.ShapeDtypeStruct.like(jnp.zeros_like(x_SD, shape=(e, d, f))),
      compiler_params=_COMPILER, interpret=interpret,
      name="grouped_matrices")(jnp.cumsum(size_E) - size_E, size_E, x_SD, y_SF)


def _load(ref, which, row_R, column_C, inside_R, inside_C):
  """Loads a tile of the matrix at index `which` (empty if `ref` is one matrix); 0 outside."""
  return triton.load(ref.at[*which, row_R[:, None], column_C[None, :]], other=0.0,
                     mask=inside_R[:, None] & inside_C[None, :])
