"""The study's whole chain on planted losses: sweeps, rates, grid, prediction, trial, tables."""

import math

import numpy as np
import pytest
from etils import epath

from experiments.study import arms, plan, units
from moe_jax.errors import FieldError
from moe_jax.evaluate.results import facts
from moe_jax.files import write_json
from moe_jax.grid import Grid, load_grid, select
from moe_jax.laws.fit import fit
from moe_jax.laws.reduce import to_cells
from moe_jax.laws.table import UNUSED, read_results
from moe_jax.study import contest, foresight, kept, rate_report, rates
from moe_jax.study.so_far import so_far
from tests.study import planted

BEST = rates.Rates({"intercept": -0.69, "n_total": -1 / 3, "sparsity": -0.05, "n_exp": 0.03})
FULL = f"tokens={arms.RECIPE.train.steps * arms.RECIPE.batch_tokens:.0f}"


def plant(folder, grid, rng, without=(), dropping=()):
  """Runs of a grid at the planted law, the worse the further from the best learning rate."""
  trunks = {config.train.branch_run for config in grid.cells}
  for name, config in zip(grid.names, grid.cells, strict=True):
    off = math.log(config.train.learning_rate / BEST.of(config.arch))
    loss = math.exp(planted.log_loss(facts(config)) + 0.02 * off**2
                    + 0.0005 * rng.standard_normal())
    if name in without:
      planted.write_run(folder, grid.name, name, config, None, "diverged", "loss is nan")
    else:
      planted.write_run(folder, grid.name, name, config, None if name in trunks else loss,
                        records=100, drop_rate=0.01 if name in dropping else 0.0,
                        every=(config.train.steps - (config.train.branch_step or 0)) // 100)


def tables(folder, grids=None):
  """The tables that are made of <folder>/runs, by name."""
  grids = grids or plan.grids()
  assert kept.keep(folder / "runs", folder / "kept", grids)[2] == []
  plan.write_tables(folder / "kept", grids)
  return {str(file.relative_to(folder / "kept")): file.read_bytes()
          for file in (folder / "kept").rglob("results.csv")}


@pytest.fixture
def fitted_rates(tmp_path, monkeypatch):
  """The sweeps are run, and the law of their optima is where the grid looks for it."""
  rng = np.random.default_rng(0)
  monkeypatch.setattr(arms, "RATES", tmp_path / "rates.json")
  arms.cell.cache_clear()
  pilots = load_grid(str(plan.FOLDER / "pilots.py"))
  plant(tmp_path / "runs", pilots, rng)
  names = tables(tmp_path)
  assert list(names) == ["study-pilots/results.csv"]
  results = str(tmp_path / "kept" / "study-pilots" / "results.csv")
  found = rates.fit_rates([rates.optimum(sweep, 0.0005) for sweep in rates.sweeps_of(
      read_results(results), results)], results)
  for name, value in BEST.coefficients.items():
    assert found.rates.coefficients[name] == pytest.approx(value, abs=0.3 if name == "intercept"
                                                           else 0.03)
  write_json(epath.Path(tmp_path) / "rates.json", rate_report.as_dict(found, b""))
  arms.cell.cache_clear()
  assert load_grid(str(plan.FOLDER / "pilots.py")).names == pilots.names
  yield found.rates
  arms.cell.cache_clear()


def test_from_sweeps_to_the_trial(fitted_rates, tmp_path):
  rng = np.random.default_rng(1)
  small, large = (load_grid(str(plan.FOLDER / f"{name}.py")) for name in ("small", "large"))
  assert {config.train.learning_rate for config in small.cells} == {
      fitted_rates.of(config.arch) for config in small.cells}
  lost, dropping = [name for name, config in zip(small.names, small.cells, strict=True)
                    if plan.in_statistic(config)][5:7]
  trunk = small.get_config(dropping).train.branch_run
  plant(tmp_path / "runs", small, rng, without=[lost], dropping=[trunk])
  before = tables(tmp_path)
  rows = read_results(tmp_path / "kept" / "results.csv")
  assert len(rows) == 39 + 12 and "diverged" in next(
      row[UNUSED] for row in rows if row["cell"] == lost)
  assert "% of assignments dropped" in next(
      row[UNUSED] for row in rows if row["cell"] == dropping)
  assert sum("not run" in row.get(UNUSED, "") for row in rows) == 13

  # predicted before it is measured, then held against what was measured
  whole = str(tmp_path / "kept" / "study" / "results.csv")
  asked = foresight.predict(select(str(plan.FOLDER / "large.py")),
                            read_results(whole, [FULL]), "paper")
  assert len(asked.rows) == 16
  predictions = [row | {name: float(row[name]) for name in ("predicted", "low", "high", "level")}
                 for row in asked.rows]
  plant(tmp_path / "runs", large, rng)
  after = tables(tmp_path)
  compared = foresight.compare(predictions, read_results(whole, [FULL]))
  assert len(compared.measured) == 16 and compared.covered >= 14
  assert np.median(np.abs(compared.errors)) < 0.002

  # the statistic from what is kept, the same however often the tables are made
  assert before.keys() == after.keys() and tables(tmp_path) == after
  cells = to_cells(read_results(tmp_path / "kept" / "results.csv"))
  assert len(cells) == 37
  found = fit(cells, "paper-curved")
  for name, value in planted.TRUTH.items():
    assert found.value(name) == pytest.approx(value, abs=0.003)

  # the tool's choice against others of one budget
  rows = read_results(whole, [FULL])
  everything = to_cells(rows)
  history = so_far([row for runs in everything.runs for row in runs], whole,
                   str(plan.FOLDER / "both_arms.py"))
  held = contest.contest(fit(everything, "paper"), history, 0.013, 3e6, rates=fitted_rates)
  grid = Grid("study-trial", arms.RECIPE, held.configs)
  plant(tmp_path / "runs", grid, rng)
  tables(tmp_path, {"study-trial": grid})
  lines = contest.rank(grid, read_results(tmp_path / "kept" / "study-trial" / "results.csv"),
                       0.0005)
  assert int(lines[-2].split()[3]) <= 4 and lines[-2].endswith("of 11")


def test_a_result_whose_drop_rate_is_not_known_does_not_count(tmp_path):
  small = load_grid(str(plan.FOLDER / "small.py"))
  name = next(name for name in small.names if plan.in_statistic(small.get_config(name)))
  planted.write_run(tmp_path / "runs", small.name, name, small.get_config(name), 2.0)
  tables(tmp_path, {small.name: small})  # its trunk has left no metrics
  with pytest.raises(FieldError, match="has no usable run, e.g. .*drop rate is not known"):
    read_results(tmp_path / "kept" / "results.csv")


def test_units_of_a_sitting(tmp_path):
  """A trunk goes with its branches; what has a result is not done again."""
  cells = select(str(plan.FOLDER / "small.py"))
  found = units.units_of(cells, lambda cell: False)
  assert len(found) == 32
  assert sorted(len(unit.cells) for unit in found) == [4] * 28 + [7] * 4
  assert sum(unit.flops for unit in found) == pytest.approx(4.4e16, rel=0.1)
  first = next(unit for unit in found if len(unit.cells) == 4)
  done = [cell for cell in first.cells if cell.config.train.branch_from][:2]
  for cell in done:
    planted.write_run(tmp_path, cell.experiment, cell.name, cell.config, 2.0)
  again = units.units_of(first.cells, lambda cell: units.is_done(cell, str(tmp_path)))
  assert [[cell.name for cell in unit.cells] for unit in again] == [
      [cell.name for cell in first.cells if cell not in done]]
  (sweep, *_) = units.units_of(select(str(plan.FOLDER / "pilots.py")), lambda cell: False)
  assert len(sweep.cells) == 5
