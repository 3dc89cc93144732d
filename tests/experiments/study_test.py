"""The study's grids are what its README says, and the power it states is what the tool finds."""

import dataclasses
import pathlib

import pytest

from experiments.study import arms
from moe_jax.arch import count
from moe_jax.grid import Cell, load_grid
from moe_jax.laws import power
from moe_jax.laws.forms import form_for
from moe_jax.laws.identify import identify
from moe_jax.laws.information import Noise, design_of
from moe_jax.study.sample import not_yet_run

FOLDER = pathlib.Path(arms.__file__).parent


def load(name):
  return load_grid(str(FOLDER / f"{name}.py"))


def cells_of(grid):
  return not_yet_run([Cell(grid.name, name, name, config)
                      for name, config in zip(grid.names, grid.cells, strict=True)])


@pytest.mark.parametrize("name,runs", [
    ("small", 2 * 16 * 4 + 12), ("large", 16 * 4), ("arm_a", 39), ("both_arms", 48),
    ("pilots", 4 * 5 + 4 * 3), ("capacity", 4), ("rehearsal", 32), ("rehearsal_dropless", 32 + 12),
    ("rate_check", 18)])
def test_every_file_loads(name, runs):
  assert len(load(name).cells) == runs


def test_what_is_held_is_held():
  for n_total in arms.SIZES:
    for shape in arms.ARM_A + arms.ARM_B:
      arch = arms.cell(n_total, *shape).arch
      assert count.n_total(arch) == pytest.approx(n_total, rel=0.02)
      assert arch.d_model / arch.n_layers == pytest.approx(arms.ASPECT, rel=0.12)
      assert arch.granularity == pytest.approx(shape[2], rel=0.06)
      assert arch.n_topk >= 2


def test_arm_b_moves_experts_alone():
  """Depth, width, N_total and N_active stay on the line of four, while n_exp grows eightfold."""
  for n_total in arms.SIZES:
    line = [arms.cell(n_total, *shape).arch for shape in (*arms.ARM_B, (32, 8, 2.0))]
    for of, spread in ((count.n_total, 0.04), (count.n_active, 0.07),
                       (lambda a: a.n_layers, 0), (lambda a: a.d_model, 0.05)):
      values = [of(arch) for arch in line]
      assert max(values) <= min(values) * (1 + spread)


def test_the_files_are_one_experiment():
  """Cells of the same architecture and length have the same name wherever they are."""
  small, large, both = (load(name) for name in ("small", "large", "both_arms"))
  assert {small.name, large.name, both.name} == {"study"}
  assert not set(small.names) & set(large.names)
  branches = [c for c in (*small.cells, *large.cells)
              if c.train.steps == arms.RECIPE.train.steps and c.train.branch_from
              and c.seed_init == 0]
  assert [c.arch for c in branches] == [c.arch for c in both.cells]


@pytest.mark.parametrize("name,law,parameter,expected", [
    ("arm_a", "paper-curved", "b_minus_c", (0.28, 0.40)),
    ("both_arms", "paper-active", "b_minus_c", (0.33, 0.47)),
    ("both_arms", "experts-or-core", "more_experts", (0.41, 0.59))])
def test_the_power_is_that_of_the_readme(name, law, parameter, expected):
  cells = cells_of(load(name))
  found = identify(form_for(law, cells), cells)
  assert not found.refused
  design = design_of(found.form, cells)
  for spread, percent in zip((0.0, 0.002), expected, strict=True):
    (ours,) = [one for one in power.power_of(design, Noise(0.002, spread), 0.001)
               if one.parameter == parameter]
    assert power.percent_over(ours.detectable, 8) == pytest.approx(percent, abs=0.0051)


@pytest.mark.parametrize("file,name", [("rehearsal", "study-rehearsal"),
                                       ("rehearsal_dropless", "study-rehearsal-dropless")])
def test_a_rehearsal_is_short_and_named_so(file, name):
  grid = load(file)
  assert grid.name == name
  assert {config.train.steps for config in grid.cells} == {305}
  assert {config.batch_tokens * config.train.steps for config in grid.cells} == {1_249_280}
  assert {config.group_tokens for config in grid.cells} == {4096}
  assert all("steps" not in name for name in grid.names)


def test_the_second_rehearsal_is_the_first_without_drops():
  first, second = load("rehearsal"), load("rehearsal_dropless")
  for config, again in zip(first.cells, second.cells[:len(first.cells)], strict=True):
    dropless = dataclasses.replace(config.moe, dispatch="dropless")
    assert again == dataclasses.replace(config, moe=dropless)
  seeds = second.cells[len(first.cells):]
  assert {config.seed_init for config in seeds} == {1, 2, 3}
  assert {config.arch for config in seeds} == {
      config.arch for config in arms.at_full_length(arms.SIZES[:1], arms.CORNERS)}


def test_arm_a_alone_cannot_tell_active_parameters_apart():
  cells = cells_of(load("arm_a"))
  assert "b_minus_c" in identify(form_for("paper-active", cells), cells).refused
