"""Recovers the configurations and the common recipe of the runs in a results table."""

import collections
import dataclasses
import pathlib
from collections.abc import Sequence

from etils import epath

from moe_jax.config import RunConfig, identity_hash
from moe_jax.errors import FieldError, require
from moe_jax.grid import cell_name, load_grid
from moe_jax.laws.table import Row
from moe_jax.run_dir import RunDir
from moe_jax.study.sample import variables


@dataclasses.dataclass(frozen=True)
class SoFar:
  """The runs so far.

  Attributes:
    experiment: name of their grid and of their directory.
    recipe: the recipe their names are relative to.
    configs: the configuration of each row of the table, in order.
  """

  experiment: str
  recipe: RunConfig
  configs: tuple[RunConfig, ...]


def so_far(rows: Sequence[Row], results: str, experiment_file: str | None = None) -> SoFar:
  """Reads the configurations from next to the table, or else from the experiment file.

  Without an experiment file, the recipe is a configuration that all the runs' names are relative
  to.

  Raises:
    FieldError: several experiments; a run whose configuration is neither next to the table
      nor in the file, or does not match its row; no recipe fits the names.
  """
  experiments = sorted({str(row.get("experiment")) for row in rows})
  require(len(experiments) == 1, "results", results, "mixes the experiments "
          f"{', '.join(experiments)}; choose with --where=experiment={experiments[0]}")
  grid = load_grid(experiment_file) if experiment_file else None
  if grid is not None:
    require(experiments[0] in (grid.name, "None"), "config", experiment_file, f"is the grid "
            f"{grid.name!r}, but {results} is of {experiments[0]!r}")
  known = dict(zip(grid.names, grid.cells, strict=True)) if grid else {}
  configs = tuple(_config(row, results, known) for row in rows)
  if grid is not None:
    return SoFar(grid.name, grid.recipe, configs)
  return SoFar(experiments[0], _recipe(rows, configs, results), configs)


def _config(row: Row, results: str, known: dict[str, RunConfig]) -> RunConfig:
  cell = row["cell"]
  config = RunDir(epath.Path(results).parent / cell).read_config() or known.get(cell)
  require(config is not None, "config", None, f"is needed: {cell} of {results} has no "
          f"{cell}/config.json next to it; give the experiment file that has this cell")
  for name, value in variables(config).items():
    if name != "tokens" and row[name] != value:
      raise FieldError("results", results, f"{cell} has {name} {row[name]:g}, but its "
                       f"configuration has {value:g}")
  if row.get("identity") not in (None, "", identity_hash(config)):
    raise FieldError("config", cell, f"has identity {identity_hash(config)} in the configuration "
                     f"and {row['identity']} in {results}: the file has changed since the run, or "
                     "the table is from an older version; evaluate the cell again")
  return config


def _recipe(rows: Sequence[Row], configs: Sequence[RunConfig], results: str) -> RunConfig:
  """Finds a configuration relative to which every run has its name, most frequent first."""
  frequent = collections.Counter(configs)
  for recipe, _ in frequent.most_common():
    if all(cell_name(config, recipe) == row["cell"]
           for row, config in zip(rows, configs, strict=True)):
      return recipe
  raise FieldError("config", None, f"is needed: the names in {pathlib.Path(results).name} are "
                   "relative to a recipe that none of its runs has; give the experiment file")
