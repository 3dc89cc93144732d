"""Lists all grids of the study, and writes the tables of their results."""

import os
import pathlib
from collections.abc import Mapping
from typing import NamedTuple

from etils import epath

from experiments.study import arms
from moe_jax.config import RunConfig
from moe_jax.evaluate.results import Row, csv_path, write_csv
from moe_jax.grid import Grid, load_grid
from moe_jax.study import kept

FOLDER = pathlib.Path(__file__).parent
RESULTS = str(FOLDER / "results")
# In the order in which they run; trial.py is generated once the law has been fitted.
GRIDS = ("pilots", "rate_check", "small", "large", "capacity", "trial")
REHEARSALS = ("rehearsal", "rehearsal_dropless", "rehearsal_tenth",
              "rehearsal_tenth_large")  # not part of the study


class Statistic(NamedTuple):
  """The input of an experiment's statistic: its arm A at full length."""

  table: str
  most_dropped: float  # exclude runs that drop at least this share of assignments after warm-up


# Routers are still learning to balance for most of a rehearsal, so no drop rate excludes a run.
STATISTICS = {"study": Statistic("results.csv", 0.001),
              "study-rehearsal": Statistic("rehearsal.csv", 1.0),
              "study-rehearsal-dropless": Statistic("rehearsal_dropless.csv", 1.0),
              "study-rehearsal-tenth": Statistic("rehearsal_tenth.csv", 1.0)}


def grids() -> dict[str, Grid]:
  """Returns experiment -> grid; files of the same experiment (small and large) are merged."""
  found: dict[str, Grid] = {}
  for name in (*GRIDS, *REHEARSALS):
    file = FOLDER / f"{name}.py"
    if file.exists():
      grid = load_grid(str(file))
      cells = (*(found[grid.name].cells if grid.name in found else ()), *grid.cells)
      found[grid.name] = Grid(grid.name, grid.recipe, cells)
  return found


def in_statistic(config: RunConfig, recipe: RunConfig = arms.RECIPE) -> bool:
  """Whether a run belongs to arm A and is as long as the recipe."""
  return (config.arch in {cell.arch for cell in arms.at_full_length(shapes=arms.ARM_A)}
          and config.train.steps == recipe.train.steps
          and config.train.decay_fraction == recipe.train.decay_fraction)


def write_tables(to: str | os.PathLike, of: Mapping[str, Grid]) -> list[str]:
  """Writes results.csv of every experiment and of the statistic from the records under `to`.

  Returns:
    A line for each experiment with the number of its runs in each state.
  """
  lines = []
  for experiment, grid in of.items():
    rows = kept.table(to, grid)
    states = [row["state"] for _, row in rows]
    lines.append(f"{experiment}: " + ", ".join(
        f"{states.count(state)} {state}" for state in dict.fromkeys(states)))
    if set(states) == {kept.NOT_RUN}:
      continue
    statistic = STATISTICS.get(experiment)
    if statistic is not None:
      rows = [(config, _counted(row, statistic.most_dropped)) for config, row in rows]
      write_csv(epath.Path(to) / statistic.table,
                [row for config, row in rows if in_statistic(config, grid.recipe)])
    write_csv(csv_path(to, experiment), [row for _, row in rows])
  return lines


def _counted(row: Row, most_dropped: float) -> Row:
  """Marks a result in `state` if its drop rate is too high or unknown, so that no fit uses it."""
  if row["loss"] is None:
    return row
  dropped = row[kept.TRAINING_DROP_RATE]
  if dropped is None:
    return row | {"state": "does not count: its drop rate is not known"}
  if dropped < most_dropped:
    return row
  return row | {"state": f"does not count: {100 * dropped:.2g} % of assignments dropped"}
