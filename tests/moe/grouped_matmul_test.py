"""Grouped products equal one product for each group, forward and gradient, in both layouts."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.moe import grouped_matmul as gm

N_EXP, D_MODEL, WIDTH, N_ROWS = 5, 6, 7, 150
PLATFORMS = ["cpu", "tpu"]  # the loop over blocks, and ragged_dot, which runs here too


def random_groups(sizes, platform, seed, dtype=np.float32):
  """Rows in the layout of the platform, matrices, and the rows that count."""
  block = gm.block_rows(platform)
  rng = np.random.default_rng(seed)
  start_E = np.asarray(gm.group_starts(jnp.asarray(sizes), block))
  row_A = np.concatenate([s + np.arange(n) for s, n in zip(start_E, sizes, strict=True)])
  x_SD = np.zeros((gm.n_block_rows(N_ROWS, N_EXP, block), D_MODEL))
  x_SD[row_A.astype(int)] = rng.normal(size=(len(row_A), D_MODEL))
  w_EDF = rng.normal(size=(N_EXP, D_MODEL, WIDTH))
  return jnp.asarray(x_SD, dtype), jnp.asarray(w_EDF, dtype), row_A.astype(int)


@functools.partial(jax.jit, static_argnums=4)
def value_and_grads(x_SD, w_EDF, size_E, dy_SF, platform):
  y_SF, pull_back = jax.vjp(lambda x, w: gm.grouped_matmul(x, w, size_E, platform), x_SD, w_EDF)
  return y_SF, *pull_back(dy_SF)


# Sizes that add up to at most N_ROWS: empty groups, full blocks, one group with everything.
SIZES = st.one_of(
    st.lists(st.integers(0, N_ROWS // N_EXP), min_size=N_EXP, max_size=N_EXP),
    st.sampled_from([[0] * N_EXP, [0, 0, N_ROWS, 0, 0], [64, 0, 64, 1, 21], [0, 1, 0, 1, 128]]))


@pytest.mark.parametrize("platform", PLATFORMS)
@hypothesis.given(sizes=SIZES, seed=st.integers(0, 2**31 - 1))
@hypothesis.settings(max_examples=30, deadline=None)
def test_equals_a_product_for_each_group(platform, sizes, seed):
  x_SD, w_EDF, row_A = random_groups(sizes, platform, seed)
  dy_SF = np.zeros((len(x_SD), WIDTH), np.float32)
  dy_SF[row_A] = np.random.default_rng(seed + 1).normal(size=(len(row_A), WIDTH))
  y_SF, dx_SD, dw_EDF = value_and_grads(x_SD, w_EDF, jnp.asarray(sizes, jnp.int32), dy_SF,
                                        platform)
  expert_A = np.repeat(np.arange(N_EXP), sizes)
  for e in range(N_EXP):
    rows = row_A[expert_A == e]
    for ours, truth in ((y_SF[rows], x_SD[rows] @ w_EDF[e]),
                        (dx_SD[rows], dy_SF[rows] @ w_EDF[e].T),
                        (dw_EDF[e], x_SD[rows].T @ dy_SF[rows])):
      np.testing.assert_allclose(ours, truth, rtol=1e-5, atol=1e-5)


def test_what_no_group_has_is_not_multiplied():
  """NaN in an expert without rows and after the last group would spread if it were."""
  sizes = [70, 0, 3, 0, 0]
  x_SD, w_EDF, row_A = random_groups(sizes, "cpu", 0)
  x_SD = x_SD.at[64 * 3:].set(jnp.nan)
  w_EDF = w_EDF.at[jnp.array([1, 3, 4])].set(jnp.nan)
  dy_SF = jnp.zeros((len(x_SD), WIDTH)).at[row_A].set(1.0).at[64 * 3:].set(jnp.nan)
  y_SF, dx_SD, dw_EDF = value_and_grads(x_SD, w_EDF, jnp.asarray(sizes, jnp.int32), dy_SF, "cpu")
  assert jnp.isfinite(y_SF).all() and jnp.isfinite(dx_SD).all() and jnp.isfinite(dw_EDF).all()


@pytest.mark.parametrize("platform", PLATFORMS)
def test_bfloat16_is_rounded_once(platform):
  """Products of bfloat16 numbers are summed in float32: the error is that of one rounding."""
  sizes = [70, 0, 3, 20, 5]
  x_SD, w_EDF, row_A = random_groups(sizes, platform, 0, jnp.bfloat16)
  size_E = jnp.asarray(sizes, jnp.int32)
  dy_SF = jnp.zeros((len(x_SD), WIDTH), jnp.bfloat16).at[row_A].set(1.0)
  ours = value_and_grads(x_SD, w_EDF, size_E, dy_SF, platform)
  truth = value_and_grads(*(x.astype(jnp.float32) for x in (x_SD, w_EDF)), size_E,
                          dy_SF.astype(jnp.float32), platform)
  for a, b in zip(ours, truth, strict=True):
    assert a.dtype == jnp.bfloat16
    a, b = (np.float32(x[row_A] if len(x) == len(x_SD) else x) for x in (a, b))
    np.testing.assert_allclose(a, b, rtol=2**-8, atol=1e-6)


@hypothesis.given(sizes=SIZES, block=st.sampled_from([1, 2, 64]))
@hypothesis.settings(max_examples=50, deadline=None)
def test_groups_are_laid_out_in_blocks_and_fit(sizes, block):
  size_E = jnp.asarray(sizes)
  start_E = np.asarray(gm.group_starts(size_E, block))
  n_rows = gm.n_block_rows(N_ROWS, N_EXP, block)
  assert n_rows % block == 0 and (start_E % block == 0).all()
  expert_J = np.asarray(gm.experts_of_blocks(size_E, n_rows // block, block))
  expected_J = np.repeat(np.arange(N_EXP), [-(-n // block) for n in sizes])
  assert len(expected_J) <= len(expert_J)
  np.testing.assert_array_equal(expert_J[:len(expected_J)], expected_J)
  assert (expert_J[len(expected_J):] == N_EXP).all()
  for start, size, e in zip(start_E, sizes, range(N_EXP), strict=True):
    assert all(expert_J[row // block] == e for row in range(start, start + size))
