"""A grid that has not been run, as the fit would see it."""

import dataclasses

import numpy as np
import pytest

from moe_jax.errors import FieldError
from moe_jax.grid import Cell, Grid, trunk_and_branches
from moe_jax.laws.reduce import to_cells
from moe_jax.laws.table import read_results
from moe_jax.study.sample import not_yet_run
from tests.study import planted


def selected(grid):
  return [Cell(grid.name, f"file:{name}", name, config)
          for name, config in zip(grid.names, grid.cells, strict=True)]


def with_train(config, **fields):
  return dataclasses.replace(config, train=dataclasses.replace(config.train, **fields))


def test_it_is_what_the_table_will_say(tmp_path):
  """Columns, architectures and seeds are those of the same grid's results."""
  grid = planted.grid(seeds=2)
  path = planted.write_runs(tmp_path, grid)
  measured, planned = to_cells(read_results(path), path), not_yet_run(selected(grid))
  assert planned.names == measured.names
  for name, values in planned.columns.items():
    np.testing.assert_array_equal(values, measured.columns[name])
  np.testing.assert_array_equal(planned.architecture, measured.architecture)
  np.testing.assert_array_equal(planned.seeds, measured.seeds)


def test_a_sweep_of_learning_rates_is_one_run():
  config = planted.RECIPE
  cells = [with_train(config, learning_rate=rate) for rate in (1e-3, 2e-3, 4e-3)]
  found = not_yet_run(selected(Grid("sweep", config, tuple(cells))))
  assert len(found) == 1 and found.seeds.tolist() == [1]


def test_a_trunk_is_no_cell_and_its_branches_share_an_architecture():
  config = planted.RECIPE
  grid = Grid("wsd", config, trunk_and_branches(config, config))
  found = not_yet_run(selected(grid))
  assert len(grid.cells) == 4 and len(found) == 3
  assert found.n_architectures == 1
  batch = config.batch_tokens
  assert sorted(found.columns["tokens"] / batch) == [50, 100, 200]


def test_what_is_no_repeat_is_named():
  config = planted.RECIPE
  other = dataclasses.replace(config, moe=dataclasses.replace(config.moe, capacity_factor=2.0))
  cells = selected(Grid("mixed", config, (config, other)))
  with pytest.raises(FieldError, match="differ in moe.capacity_factor .*--without="):
    not_yet_run(cells)
  assert len(not_yet_run(cells, [cells[1].name])) == 1
  with pytest.raises(FieldError, match="without='x': no such cell"):
    not_yet_run(cells, ["x"])
  with pytest.raises(FieldError, match="leaves no cells"):
    not_yet_run(cells, [cell.name for cell in cells])


def test_one_law_is_of_one_text():
  config = planted.RECIPE
  other = dataclasses.replace(
      config, arch=dataclasses.replace(config.arch, n_topk=8),
      data=dataclasses.replace(config.data, seq_len=256))
  with pytest.raises(FieldError, match="data.seq_len .*to a single text"):
    not_yet_run(selected(Grid("mixed", config, (config, other))))
