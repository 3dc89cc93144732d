"""Reduces rows to cells: averages seeds, and takes the optimum of each learning-rate sweep."""

import collections
import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from moe_jax.errors import FieldError
from moe_jax.laws.cells import Cells
from moe_jax.laws.table import (
    ARCHITECTURE,
    DETAILS,
    NOT_ROUTED,
    RECIPE,
    RECIPE_HASH,
    UNUSED,
    Row,
    differing,
)

_COLUMNS = (*ARCHITECTURE, "tokens")
MOST_AMPLIFIED = 2.0  # do not use a vertex whose variance exceeds this multiple of one run's


def to_cells(rows: list[Row], source: str = "results.csv") -> Cells:
  """Reduces rows to one cell for each architecture and number of tokens.

  Losses are averaged over seeds in ln L. If a cell was trained at several learning rates, its
  loss is the vertex of the parabola in ln(learning rate) through the best rate and its two
  neighbors (or the best loss itself if two of these rates nearly coincide). A cell whose best
  rate is at the edge of its sweep is refused and listed in the notes. `unused` holds the rows
  marked UNUSED and those of refused cells.

  Raises:
    FieldError: there is only one architecture; runs differ in more than seed and learning
      rate; every cell is refused.
  """
  groups: dict[tuple, list[Row]] = collections.defaultdict(list)
  unused = [row for row in rows if UNUSED in row]
  rows = [row for row in rows if UNUSED not in row]
  for row in rows:
    groups[tuple(row[name] for name in _COLUMNS)].append(row)
  if len({key[:len(ARCHITECTURE)] for key in groups}) == 1:
    raise FieldError("results", source, f"has one architecture ({rows[0]['cell']}): a law "
                     "needs several")
  for group in groups.values():
    check_repeats(group, source)
  noise, df = _seed_noise(groups)
  kept = {}
  for key, group in groups.items():
    best = _envelope(group)
    if best is None:
      unused += [row | {UNUSED: "refused: the best learning rate is at the edge of the sweep"}
                 for row in group]
    else:
      kept[key] = best
  if not kept:
    raise FieldError("results", source, "the best learning rate of every cell is at the "
                     "edge of its sweep: there is no usable optimum")
  values = np.array(list(kept))
  log_loss, share = np.array(list(kept.values())).T
  cells = Cells.of(
      np.exp(log_loss), names=tuple(shortest_name(groups[key]) for key in kept),
      architecture=values[:, :len(ARCHITECTURE)],
      loss_se=noise * np.sqrt(share) * np.exp(log_loss), seeds=1 / share,
      notes=tuple(_notes(rows, groups, kept, noise, df, unused)),
      **dict(zip(_COLUMNS, values.T, strict=True)))
  return dataclasses.replace(cells, runs=tuple(tuple(groups[key]) for key in kept),
                             unused=tuple(unused))


def check_repeats(group: Sequence[Row], source: str) -> None:
  """Raises FieldError if runs of one architecture and length are not repeats of each other.

  They may differ only in seed and learning rate.
  """
  for column in differing(group, (*RECIPE, *DETAILS)):
    cells: dict[str, str] = {}
    for row in group:
      cells.setdefault(str(row.get(column)), row["cell"])
    values = sorted(cells)
    listed = ", ".join(values)
    what = (f"a recipe setting that has no column ({column} {listed})" if column == RECIPE_HASH
            else f"{column} ({listed})")
    raise FieldError("results", source, f"{cells[values[0]]} and {cells[values[1]]} have the "
                     f"same architecture but differ in {what}; choose with "
                     f"--where={column}={values[0]}")


def shortest_name(group: list[Row]) -> str:
  """Returns the shortest name among the runs: sweeps and seeds add suffixes to it."""
  return min((row["cell"] for row in group), key=lambda name: (len(name), name))


def by_learning_rate(group: list[Row]) -> dict[float, list[float]]:
  """Returns {learning rate: ln L of each seed}, ascending in the learning rate."""
  found = collections.defaultdict(list)
  for row in group:
    found[row["learning_rate"]].append(math.log(row["loss"]))
  return dict(sorted(found.items()))


def _seed_noise(groups: dict[tuple, list[Row]]) -> tuple[float, int]:
  """Returns the pooled standard deviation of ln L between seeds and its degrees of freedom."""
  squares, df = 0.0, 0
  for group in groups.values():
    for losses in by_learning_rate(group).values():
      squares += float(np.sum((np.array(losses) - np.mean(losses))**2))
      df += len(losses) - 1
  return (math.sqrt(squares / df), df) if df else (math.nan, 0)


def _envelope(group: list[Row]) -> tuple[float, float] | None:
  """Returns ln L at the best learning rate, and its variance relative to that of one run.

  None if the best rate is at the edge of those swept.
  """
  swept = by_learning_rate(group)
  means = np.array([np.mean(losses) for losses in swept.values()])
  counts = np.array([len(losses) for losses in swept.values()])
  if len(means) == 1:
    return float(means[0]), 1 / counts[0]
  best = int(np.argmin(means))
  if best in (0, len(means) - 1):
    return None
  around = slice(best - 1, best + 2)
  x = np.log(list(swept))[around]
  curve = np.polynomial.Polynomial.fit(x, means[around], 2)
  slope = curve.deriv()
  vertex = slope.roots()[0] if slope.degree() == 1 and slope.coef[1] != 0 else x[1]
  # To first order the error of the vertex's position does not matter: the slope there is zero.
  weights = [np.prod([(vertex - x[j]) / (x[i] - x[j]) for j in range(3) if j != i])
             for i in range(3)]
  if np.sum(np.square(weights)) > MOST_AMPLIFIED:  # two rates so close that noise sets the curve
    return float(means[best]), 1 / counts[best]
  return float(curve(vertex)), float(np.sum(np.square(weights) / counts[around]))


def _notes(rows, groups, kept, noise, df, unused) -> list[str]:
  found = [f"{len(rows)} runs, {len(groups)} cells, {len(kept)} used"]
  why = collections.defaultdict(list)
  for row in unused:
    why[row[UNUSED]].append(row["cell"])
  found += [f"NOT USED, {reason}: {', '.join(names)}" for reason, names in why.items()]
  swept = sum(len(by_learning_rate(group)) > 1 for group in groups.values())
  if not swept:
    found.append("one learning rate per cell: the optimum depends on sparsity, so every "
                 "slope may have a bias that these data cannot show")
  elif swept < len(groups):
    found.append(f"{len(groups) - swept} cells have one learning rate and {swept} a sweep: the "
                 "losses of the former are above their optimum by an unknown amount")
  found.append(f"noise between seeds: {100 * noise:.2g} % of the loss ({df} degrees of "
               "freedom)" if df else "no cell has two seeds: noise cannot be separated from "
               "lack of fit")
  varied = differing(rows, (*RECIPE, *NOT_ROUTED))
  if varied:
    found.append(f"the recipe varies between cells in {', '.join(varied)}: the law "
                 "attributes this to shape")
  return found
