"""Grouped products equal one product for each group, forward and gradient."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.moe import grouped_matmul as gm

N_EXP, D_MODEL, WIDTH, N_ROWS = 5, 6, 7, 600
PLATFORMS = ["gpu", "tpu"]  # the loop over blocks, and ragged_dot, which runs here too


def random_groups(sizes, seed, dtype=np.float32):
  """Rows, zeros after the last group, and matrices."""
  rng = np.random.default_rng(seed)
  x_SD = np.zeros((N_ROWS + gm.SPARE_ROWS, D_MODEL))
  x_SD[:sum(sizes)] = rng.normal(size=(sum(sizes), D_MODEL))
  w_EDF = rng.normal(size=(N_EXP, D_MODEL, WIDTH))
  return jnp.asarray(x_SD, dtype), jnp.asarray(w_EDF, dtype)


@functools.partial(jax.jit, static_argnums=4)
def value_and_grads(x_SD, w_EDF, size_E, dy_SF, platform):
  y_SF, pull_back = jax.vjp(lambda x, w: gm.grouped_matmul(x, w, size_E, platform), x_SD, w_EDF)
  return y_SF, *pull_back(dy_SF)


# Sizes that add up to at most N_ROWS: empty groups, full blocks, one group with everything.
SIZES = st.one_of(
    st.lists(st.integers(0, N_ROWS // N_EXP), min_size=N_EXP, max_size=N_EXP),
    st.sampled_from([[0] * N_EXP, [0, 0, N_ROWS, 0, 0], [256, 0, 256, 1, 21], [0, 1, 0, 1, 512]]))


@pytest.mark.parametrize("platform", PLATFORMS)
@hypothesis.given(sizes=SIZES, seed=st.integers(0, 2**31 - 1))
@hypothesis.settings(max_examples=30, deadline=None)
def test_equals_a_product_for_each_group(platform, sizes, seed):
  x_SD, w_EDF = random_groups(sizes, seed)
  dy_SF = np.zeros((len(x_SD), WIDTH), np.float32)
  dy_SF[:sum(sizes)] = np.random.default_rng(seed + 1).normal(size=(sum(sizes), WIDTH))
  y_SF, dx_SD, dw_EDF = value_and_grads(x_SD, w_EDF, jnp.asarray(sizes, jnp.int32), dy_SF,
                                        platform)
  x_SD, w_EDF = np.float64(x_SD), np.float64(w_EDF)
  for e, end in enumerate(np.cumsum(sizes)):
    rows = slice(end - sizes[e], end)
    for ours, truth in ((y_SF[rows], x_SD[rows] @ w_EDF[e]),
                        (dx_SD[rows], dy_SF[rows] @ w_EDF[e].T),
                        (dw_EDF[e], x_SD[rows].T @ dy_SF[rows])):
      np.testing.assert_allclose(ours, truth, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_what_no_group_has_counts_for_nothing(platform):
  """NaN after the last group, as a TPU may leave there, and in an expert without rows."""
  sizes = [70, 0, 3, 0, 0]
  x_SD, w_EDF = random_groups(sizes, 0)
  x_SD = x_SD.at[73:].set(jnp.nan)
  if platform == "gpu":  # ragged_dot multiplies for every expert here, but not on a TPU
    w_EDF = w_EDF.at[jnp.array([1, 3, 4])].set(jnp.nan)
  dy_SF = jnp.ones((len(x_SD), WIDTH)).at[73:].set(jnp.nan)
  y_SF, dx_SD, dw_EDF = value_and_grads(x_SD, w_EDF, jnp.asarray(sizes, jnp.int32), dy_SF,
                                        platform)
  for x in (y_SF[:73], dx_SD[:73], dw_EDF):
    assert jnp.isfinite(x).all()


@pytest.fixture
def without_kernels(monkeypatch):
  """The loop over blocks in bfloat16 too, as on a GPU whose JAX has no Triton."""
  monkeypatch.setattr(gm, "_kernels", lambda *_: None)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_bfloat16_is_rounded_once(platform, without_kernels):
  """Products of bfloat16 numbers are summed in float32: the error is that of one rounding."""
  sizes = [70, 0, 3, 20, 5]
  x_SD, w_EDF = random_groups(sizes, 0, jnp.bfloat16)
  size_E = jnp.asarray(sizes, jnp.int32)
  dy_SF = jnp.ones((len(x_SD), WIDTH), jnp.bfloat16)
  ours = value_and_grads(x_SD, w_EDF, size_E, dy_SF, platform)
  truth = value_and_grads(*(x.astype(jnp.float32) for x in (x_SD, w_EDF)),
                          size_E, dy_SF.astype(jnp.float32), platform)
  for a, b in zip(ours, truth, strict=True):
    assert a.dtype == jnp.bfloat16
    a, b = (np.float32(x[:sum(sizes)]) for x in (a, b))
    np.testing.assert_allclose(a, b, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_a_gradient_of_many_blocks_is_rounded_once(platform, without_kernels):
  """Sums of positive numbers: in bfloat16, each block would add its own rounding."""
  n_rows, rng = 8192, np.random.default_rng(0)

  def positive(*shape):
    return jnp.asarray(rng.uniform(0.5, 1.5, shape), jnp.bfloat16)

  x_SD, dy_SF = (jnp.pad(positive(n_rows, width), ((0, gm.SPARE_ROWS), (0, 0)))
                 for width in (D_MODEL, WIDTH))
  _, _, dw_EDF = value_and_grads(x_SD, positive(1, D_MODEL, WIDTH), jnp.array([n_rows]), dy_SF,
                                 platform)
  truth = np.float64(x_SD).T @ np.float64(dy_SF)
  np.testing.assert_allclose(np.float64(dw_EDF[0]), truth, rtol=1.01 * 2**-8)


def test_the_gradient_of_the_matrices_is_no_array_of_all_rows_for_each_expert():
  """Read off what is lowered for them: nothing has S * E rows."""

  def grads(x_SD, w_EDF, size_E, platform):
    return jax.grad(lambda x, w: gm.grouped_matmul(x, w, size_E, platform).sum(),
                    argnums=(0, 1))(x_SD, w_EDF)

  x_SD, w_EDF = random_groups([30] * N_EXP, 0)
  for platform, lowered_for in (("gpu", "cuda"), ("tpu", "tpu")):
    lowered = jax.jit(grads, static_argnums=3).trace(
        x_SD, w_EDF, jnp.full(N_EXP, 30), platform).lower(
            lowering_platforms=(lowered_for,)).as_text()
    assert f"tensor<{len(x_SD)}x{D_MODEL}xf32>" in lowered
    assert f"tensor<{N_EXP}x{len(x_SD)}x" not in lowered
