"""Builds the cells of a grid that has not been run, in the form that a fit uses."""

import collections
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from moe_jax.config import RunConfig
from moe_jax.errors import FieldError, did_you_mean
from moe_jax.evaluate.results import facts, same_in_repeats
from moe_jax.grid import Cell
from moe_jax.laws.cells import Cells
from moe_jax.laws.table import ARCHITECTURE

COLUMNS = (*ARCHITECTURE, "tokens")


def variables(config: RunConfig) -> dict[str, float]:
  """Returns the law's variables that a configuration determines."""
  known = facts(config)
  known["tokens"] = config.train.steps * config.batch_tokens
  return {name: float(known[name]) for name in COLUMNS}


def not_yet_run(cells: Sequence[Cell], without: Iterable[str] = ()) -> Cells:
  """Converts selected cells of an experiment file to cells of a fit, all with a loss of 1.

  Runs of one architecture and number of tokens form one cell. Its number of seeds is the smallest
  over its learning rates, so a sweep with one seed counts as one run. Trunks without a decay of
  their own are skipped.

  Raises:
    FieldError: an unknown name in `without`, no cell left, data that differ between cells, or
      runs of one architecture that differ in more than seed and learning rate.
  """
  names = [cell.name for cell in cells]
  for name in without:
    if name not in names:
      raise FieldError("without", name, "no such cell; " + did_you_mean(name, names))
  trunks = {cell.config.train.branch_run for cell in cells}
  cells = [cell for cell in cells if cell.name not in set(without)
           and not (cell.name in trunks and cell.config.train.decay_fraction == 0)]
  if not cells:
    raise FieldError("without", ",".join(without), "leaves no cells")
  groups: dict[tuple, list[Cell]] = collections.defaultdict(list)
  for cell in cells:
    groups[tuple(variables(cell.config).values())].append(cell)
  _check_same(cells, "data.")
  for group in groups.values():
    _check_same(group, "")
  values = np.array(list(groups))
  runs = [min(collections.Counter(c.config.train.learning_rate for c in group).values())
          for group in groups.values()]
  return Cells.of(np.ones(len(values)), names=tuple(g[0].name for g in groups.values()),
                  architecture=values[:, :len(ARCHITECTURE)], seeds=runs,
                  notes=(f"{len(cells)} runs, {len(values)} cells",),
                  **dict(zip(COLUMNS, values.T, strict=True)))


def _check_same(cells: Sequence[Cell], prefix: str) -> None:
  """Raises FieldError if cells differ in a field under `prefix` that repeats must share."""
  first = _held(cells[0].config, prefix)
  for cell in cells[1:]:
    ours = _held(cell.config, prefix)
    for path in first:
      if ours[path] != first[path]:
        raise FieldError(
            "config", f"{cells[0].name} and {cell.name}",
            f"differ in {path} ({first[path]!r} and {ours[path]!r}): "
            + ("a law is fitted to a single text" if prefix else "they are not repeats of one cell")
            + f"; leave one out with --without={cell.name}")


def _held(config: RunConfig, prefix: str) -> dict[str, Any]:
  return {path: value for path, value in same_in_repeats(config).items()
          if path.startswith(prefix)}
