"""The kernels' own programs, interpreted, against a product for each group, and what is lowered for
a GPU. They have never run on one here."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import moe
from moe_jax.mesh import DATA, MESH_AXES
from moe_jax.moe import grouped_triton as gt
from moe_jax.moe.grouped_matmul import SPARE_ROWS, blocks_of, grouped_matmul
from tests.gpu import pretend_h100


def groups(sizes, d, f, dtype=jnp.float32):
  """x_SD, w_EDF, dy_SF, size_E; NaN where no group has rows."""
  rng, n_rows = np.random.default_rng(0), sum(sizes) + SPARE_ROWS
  shapes = (n_rows, d), (len(sizes), d, f), (n_rows, f)
  x_SD, w_EDF, dy_SF = (rng.normal(size=shape) for shape in shapes)
  x_SD[sum(sizes):] = dy_SF[sum(sizes):] = np.nan
  return *(jnp.asarray(x, dtype) for x in (x_SD, w_EDF, dy_SF)), jnp.asarray(sizes, jnp.int32)


# More than a block and nothing; whole blocks; one row of a matrix narrower than any tile; nothing.
@pytest.mark.parametrize("sizes, d, f", [([130, 0, 257, 1, 40], 100, 72), ([128, 256], 64, 256),
                                         ([0, 1, 0], 5, 3), ([0, 0], 64, 128)])
def test_equals_a_product_for_each_group(sizes, d, f):
  x_SD, w_EDF, dy_SF, size_E = groups(sizes, d, f)
  blocks = blocks_of(len(x_SD), size_E, gt.ROWS)
  y_SF = gt.multiply_rows(x_SD, w_EDF, blocks.expert_J, blocks.start_J, blocks.inside_J,
                          interpret=True)
  dw_EDF = gt.sum_of_outer_products(x_SD, dy_SF, size_E, interpret=True)
  x_SD, w_EDF, dy_SF = (np.float64(x) for x in (x_SD, w_EDF, dy_SF))
  for e, end in enumerate(np.cumsum(sizes)):
    rows = slice(end - sizes[e], end)
    np.testing.assert_allclose(y_SF[rows], x_SD[rows] @ w_EDF[e], rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(dw_EDF[e], x_SD[rows].T @ dy_SF[rows], rtol=1e-5, atol=1e-4)
  np.testing.assert_array_equal(y_SF[sum(sizes):], 0)


def test_bfloat16_is_rounded_once_in_a_population_too():
  """As a step of several runs takes them: each with groups of its own, gradients by vmap."""
  sizes = [130, 0, 100], [7, 223, 0]
  x_PSD, w_PEDF, dy_PSF, size_PE = map(jnp.stack, zip(*(
      groups(each, 64, 48, jnp.bfloat16) for each in sizes), strict=True))

  def both(x_SD, w_EDF, dy_SF, size_E):
    blocks = blocks_of(len(x_SD), size_E, gt.ROWS)
    return (gt.multiply_rows(x_SD, w_EDF, blocks.expert_J, blocks.start_J, blocks.inside_J,
                             interpret=True),
            gt.sum_of_outer_products(x_SD, dy_SF, size_E, interpret=True))

  y_PSF, dw_PEDF = jax.vmap(both)(x_PSD, w_PEDF, dy_PSF, size_PE)
  x_PSD, w_PEDF, dy_PSF = (np.float64(x) for x in (x_PSD, w_PEDF, dy_PSF))
  for p, each in enumerate(sizes):
    for e, end in enumerate(np.cumsum(each)):
      rows = slice(end - each[e], end)
      for ours, truth in ((y_PSF[p, rows], x_PSD[p, rows] @ w_PEDF[p, e]),
                          (dw_PEDF[p, e], x_PSD[p, rows].T @ dy_PSF[p, rows])):
        np.testing.assert_allclose(np.float64(ours), truth, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("where", ["alone", "population", "mesh"])
def test_a_gpu_gets_them_for_bfloat16_forward_and_backward(where, monkeypatch):
  """Also under vmap, and where each device has rows of its own."""
  pretend_h100(monkeypatch)
  *arrays, size_E = groups([130, 0, 100], 64, 48, jnp.bfloat16)

  def grads(x_SD, w_EDF, dy_SF):
    y_SF, back = jax.vjp(lambda x, w: grouped_matmul(x, w, size_E, "gpu"), x_SD, w_EDF)
    return y_SF, *back(dy_SF)

  if where == "population":
    grads, arrays = jax.vmap(grads), [jnp.stack([x, x]) for x in arrays]
  if where == "mesh":
    mesh = jax.make_mesh((2, 1, 1), MESH_AXES, devices=jax.devices()[:2],
                         axis_types=(jax.sharding.AxisType.Auto,) * 3)
    spec = jax.P(DATA)
    grads = jax.shard_map(grads, mesh=mesh, in_specs=spec, out_specs=spec)
    arrays = [jnp.concatenate([x, x]) for x in arrays]
  lower = functools.partial(jax.jit(grads).trace(*arrays).lower, lowering_platforms=("cuda",))
  lowered = lower().as_text()
  # The product, and the gradients of rows and matrices.
  assert lowered.count("grouped_rows") >= 2 and lowered.count("__gpu$xla.gpu.triton") == 3


def test_a_jax_without_triton_has_the_loop(monkeypatch):
  monkeypatch.setitem(sys.modules, "moe_jax.moe.grouped_triton", None)
  monkeypatch.delattr(moe, "grouped_triton")
  *arrays, size_E = groups([130, 0, 100], 64, 48, jnp.bfloat16)
  lowered = jax.jit(lambda x, w, _: grouped_matmul(x, w, size_E, "gpu")).trace(*arrays).lower(
      lowering_platforms=("cuda",)).as_text()
  assert "triton" not in lowered and "while" in lowered


def test_float32_is_left_to_products_that_round_nothing():
  *arrays, size_E = groups([130, 0, 100], 64, 48)
  lowered = jax.jit(lambda x, w, _: grouped_matmul(x, w, size_E, "gpu")).trace(*arrays).lower(
      lowering_platforms=("cuda",)).as_text()
  assert "triton" not in lowered and "HIGHEST" in lowered
