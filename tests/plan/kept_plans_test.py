"""What the README says of the planned grid is what the kept tables hold."""

import csv

import pytest

from moe_jax.grid import select
from moe_jax.plan import topology
from tests.experiment_files import ROOT

README = (ROOT / "README.md").read_text()
PLANS = (ROOT / "docs" / "plans" / "README.md").read_text()
GRID = {cell.name: cell.config for cell in select("experiments/scaling_law.py")}


@pytest.mark.parametrize("name", ["v5litepod-32", "v5p-16", "v6e-16"])
def test_the_scaling_law_grid_is_planned_whole_and_costs_what_is_said(name):
  with open(ROOT / f"docs/plans/scaling_law.{name}.csv") as file:
    rows = list(csv.DictReader(file))
  assert {row["cell"] for row in rows} == set(GRID) and len(rows) == len(GRID)
  chip = topology.parse(name).hardware
  hours = 0.0
  for row in rows:
    assert row["fits"] == "True" and float(row["hbm_needed"]) <= chip.program_hbm_bytes
    train = GRID[row["cell"]].train
    step = float(row["step_seconds"])
    assert float(row["chip_hours"]) == pytest.approx(step * train.steps * int(row["chips"]) / 3600)
    hours += float(row["chip_hours"])
  told = (f"{len(rows)} of {len(rows)} cells planned on {name}: {hours:,.4g} chip-hours, USD "
          f"{hours * chip.usd_per_chip_hour:,.0f} at")
  assert told in README and told in PLANS
