"""Candidates are shapes of the size asked for, each with the recipe of its neighbour."""

import dataclasses

import pytest

from moe_jax import arch
from moe_jax.arch import count
from moe_jax.errors import FieldError
from moe_jax.study import candidates
from tests.study import planted

DONE = planted.grid().cells


def test_the_region_follows_the_runs():
  found = candidates.region(DONE)
  assert [round(n, -5) for n in found.n_total] == [700_000, 2_000_000]
  assert found.n_exp == (4, 8, 16, 32, 64)
  assert found.sparsity == (2, 4, 8, 16)
  assert found.granularity == pytest.approx((2.0,), rel=0.1)
  assert found.aspect is None and "n_layers of the nearest run" in str(found)
  asked = candidates.region(DONE, n_exp=(12,), aspect=20.0, sparsity=None)
  assert asked.n_exp == (12,) and asked.aspect == 20 and asked.sparsity == found.sparsity


def test_the_aspect_is_held_where_depth_varies():
  shape = arch.solve(template=DONE[0].arch, n_total=700_000, n_exp=8, n_topk=4, n_layers=3,
                     granularity=2.0, limits=arch.IsoLimits(4, 2))
  deeper = dataclasses.replace(DONE[0], arch=shape.arch)
  found = candidates.region([*DONE, deeper])
  assert found.aspect == pytest.approx(candidates.mean_aspect([*DONE, deeper]))


def test_experts_wider_than_the_model_are_in_the_region_of_their_runs():
  wide = dataclasses.replace(DONE[0], arch=dataclasses.replace(DONE[0].arch, d_expert=
                                                               2 * DONE[0].arch.d_model))
  assert min(candidates.region([*DONE, wide]).granularity) == 0.5
  with pytest.raises(FieldError, match="granularity=0.0: must be above 0"):
    candidates.region(DONE, granularity=(0.0,))


def test_new_cells_have_the_size_and_are_new():
  where = candidates.region(DONE, n_total=(1_000_000,), granularity=(1.0, 2.0))
  found = candidates.new_cells(where, DONE)
  assert len(found.configs) > 10
  assert len({config.arch for config in found.configs}) == len(found.configs)
  assert not {config.arch for config in found.configs} & {run.arch for run in DONE}
  for config in found.configs:
    assert count.n_total(config.arch) == pytest.approx(1e6, rel=5e-3)
    assert config.arch.sparsity in where.sparsity
    assert config.arch.d_model % 4 == 0 and config.arch.n_layers == 2
    assert (config.train, config.moe, config.data) == (DONE[0].train, DONE[0].moe, DONE[0].data)


def test_combinations_that_cannot_be_are_counted():
  where = candidates.region(DONE, n_exp=(2, 3, 20_000), sparsity=(2.0,))
  found = candidates.new_cells(where, DONE)  # 3 / 2 is no n_topk; 2 / 2 is 1
  assert found.refused and "norm_topk_prob" in found.refused[0]
  assert found.unsolved == 2
  assert not found.configs


def test_the_recipe_is_the_nearest_runs():
  """Its learning rate and length; never that it branched from another run."""
  slow = dataclasses.replace(
      DONE[-1], train=dataclasses.replace(DONE[-1].train, learning_rate=3e-4, steps=400,
                                          branch_from="trunk@100"))
  runs = [*DONE[:-1], slow]
  its = slow.arch
  assert candidates.nearest(runs, 2e6, its.n_exp, its.sparsity, 2.0) is slow
  found = candidates.new_cells(candidates.region(runs, n_exp=(64,), n_total=(2_000_000,),
                                                 sparsity=(4.0,)), runs)
  (config,) = found.configs
  assert config.train.learning_rate == 3e-4 and config.train.steps == 400
  assert config.train.branch_from is None


def test_flops_are_those_of_the_whole_run():
  config = DONE[0]
  assert candidates.flops(config) == (200 * 16 * 128) * count.training_flops_per_token(
      config.arch, 128)
