"""Predicts the losses of cells that have not run, and compares predictions with measurements."""

import csv
import dataclasses
import hashlib
import io
import json
import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from moe_jax.config import identity_hash
from moe_jax.design.judge import jackknife
from moe_jax.errors import FieldError, require
from moe_jax.grid import Cell
from moe_jax.laws.cells import Cells
from moe_jax.laws.fit import Fit, fit
from moe_jax.laws.information import design_of
from moe_jax.laws.reduce import to_cells
from moe_jax.laws.table import UNUSED, Row
from moe_jax.study import sample
from moe_jax.study.sample import variables

LEVEL = 0.95
_LOSSES = ("predicted", "low", "high")
COLUMNS = ("experiment", "cell", "identity", *sample.COLUMNS, *_LOSSES, "level", "law", "fit")


@dataclasses.dataclass(frozen=True)
class Foreseen:
  """A fitted law's predictions.

  Attributes:
    fitted: the law.
    rows: COLUMNS of each cell, as text.
    notes: lines on what was predicted, and from what.
  """

  fitted: Fit
  rows: tuple[dict[str, str], ...]
  notes: tuple[str, ...]

  def lines(self) -> list[str]:
    width = max(len(row["cell"]) for row in self.rows)
    return [*self.notes, *(f"{row['cell']:{width}s}  {row['predicted']} [{row['low']}, "
                           f"{row['high']}]" for row in self.rows)]


def predict(cells: Sequence[Cell], rows: Sequence[Row], law: str,
            source: str = "results.csv") -> Foreseen:
  """Predicts the losses of the cells by a law fitted to the rows, with 95 % prediction intervals.

  Trunks are skipped, as they have no loss of their own. If the law has no variable for tokens,
  cells with tokens outside the range of the rows are skipped too; the notes report both.

  Raises:
    FieldError: the rows already have the loss of one of the cells, no cell is left, or the law
      cannot be fitted or has no covariance.
  """
  from scipy import stats
  fitted = fit(to_cells(list(rows), source), law)
  measured = {row.get("identity"): row["cell"] for row in rows if UNUSED not in row}
  trunks = {cell.config.train.branch_run for cell in cells}
  asked = [cell for cell in cells if cell.name not in trunks]
  if "tokens" not in fitted.identified.asked.columns:
    trained = fitted.cells.columns["tokens"]
    asked = [cell for cell in asked if trained.min() <= 1.01 * variables(cell.config)["tokens"]
             and variables(cell.config)["tokens"] <= 1.01 * trained.max()]
  require(bool(asked), "config", cells[0].selector, f"none of these {len(cells)} cells is as long "
          f"as the runs {law} was fitted to: choose other rows with --where, or a law with tokens")
  for cell in asked:
    if identity_hash(cell.config) in measured:
      raise FieldError("results", source, f"already has the loss of {cell.name}: a measured "
                       "cell cannot be predicted")
  values = np.array([list(variables(cell.config).values()) for cell in asked])
  at = Cells.of(np.ones(len(asked)), names=tuple(cell.name for cell in asked),
                **dict(zip(sample.COLUMNS, values.T, strict=True)))
  covariance_PP, df = jackknife(fitted)
  x_NP = design_of(fitted.form, at, fitted.least_squares.theta).x_NP
  half_N = stats.t.ppf((1 + LEVEL) / 2, df) * np.sqrt(
      np.einsum("np,pq,nq->n", x_NP, covariance_PP, x_NP) + fitted.scatter_of_one_run**2)
  center_N, fingerprint = fitted.log_loss(at), fingerprint_of(fitted)
  found = [
      {"experiment": cell.experiment, "cell": cell.name, "identity": identity_hash(cell.config),
       **{name: f"{value:g}" if value < 1e5 else f"{value:.0f}"
          for name, value in zip(sample.COLUMNS, row, strict=True)},
       **{name: f"{math.exp(center + sign * half):.6f}"
          for name, sign in zip(_LOSSES, (0, -1, 1), strict=True)},
       "level": f"{LEVEL:g}", "law": fitted.form.name, "fit": fingerprint}
      for cell, row, center, half in zip(asked, values, center_N, half_N, strict=True)]
  notes = [*fitted.cells.notes, *(f"{name}: not identified, {why}"
                                  for name, why in fitted.identified.refused.items()),
           f"{len(found)} of {len(cells)} cells predicted by {fitted.form.name}, fit "
           f"{fingerprint}; the rest are trunks or have other lengths"]
  notes += fitted.doubts
  known = {row.get("identity") for row in rows
           if UNUSED in row and isinstance(row["loss"], float) and math.isfinite(row["loss"])}
  seen = [row["cell"] for row in found if row["identity"] in known]
  if seen:
    notes.append(f"{len(seen)} of them already have a loss in {source} that the fit does not "
                 f"use, so they are not predictions: {', '.join(seen)}")
  return Foreseen(fitted, tuple(found), tuple(notes))


def fingerprint_of(fitted: Fit) -> str:
  """Returns a 12-digit hex hash of the form, its coefficients and the runs it was fitted to."""
  runs = sorted((str(row.get("identity")), f"{row['loss']:.9g}")
                for group in fitted.cells.runs for row in group)
  theta = {name: f"{value:.9g}" for name, value in
           zip(fitted.parameters, fitted.least_squares.theta, strict=True)}
  told = json.dumps([fitted.form.name, theta, runs], sort_keys=True)
  return hashlib.sha256(told.encode()).hexdigest()[:12]


def read(path: str | os.PathLike) -> list[dict[str, Any]]:
  """Reads a file of moe_jax.study.predict, with losses and level as floats. Raises FieldError."""
  try:
    rows = list(csv.DictReader(io.StringIO(epath.Path(path).read_text())))
    return [row | {name: float(row[name]) for name in (*_LOSSES, "level")}
            | {name: row[name] for name in ("cell", "identity", "law", "fit")} for row in rows]
  except OSError as error:
    raise FieldError("predictions", str(path), f"cannot be read: {error.strerror}") from None
  except (ValueError, KeyError, TypeError):
    raise FieldError("predictions", str(path), "was not written by --write: it needs the columns "
                     + ", ".join(COLUMNS)) from None


@dataclasses.dataclass(frozen=True)
class Compared:
  """Predictions matched with measured losses.

  Attributes:
    measured: (prediction, measured loss) for each cell with a loss.
    missing: (prediction, why there is no loss) for each of the others.
  """

  measured: tuple[tuple[dict[str, Any], float], ...]
  missing: tuple[tuple[dict[str, Any], str], ...]

  @property
  def errors(self) -> np.ndarray:
    """Measured minus predicted ln L, [n]."""
    return np.array([math.log(loss / one["predicted"]) for one, loss in self.measured])

  @property
  def covered(self) -> int:
    return sum(one["low"] <= loss <= one["high"] for one, loss in self.measured)

  def lines(self, target_percent: float) -> list[str]:
    lines = []
    for one, loss in self.measured:
      outside = "" if one["low"] <= loss <= one["high"] else ", outside its interval"
      lines.append(f"{one['cell']} ({one['identity']}): predicted {one['predicted']:.4f}, measured "
                   f"{loss:.4f}, {100 * math.log(loss / one['predicted']):+.2f} %{outside}")
    lines += [f"{one['cell']} ({one['identity']}): predicted {one['predicted']:.4f}, {why}"
              for one, why in self.missing]
    if not self.measured:
      return [*lines, "none of them has been measured"]
    size = 100 * np.abs(self.errors)
    first = self.measured[0][0]
    return [*lines,
            f"{len(self.measured)} of {len(self.measured) + len(self.missing)} measured; law "
            f"{first['law']}, fit {', '.join(sorted({one['fit'] for one, _ in self.measured}))}",
            f"median absolute error {np.median(size):.2g} % of the loss (target {target_percent:g} "
            f"%: {'met' if np.median(size) <= target_percent else 'missed'}), largest "
            f"{size.max():.2g} %, mean {100 * self.errors.mean():+.2g} %",
            f"{self.covered} of {len(self.measured)} lie within their {100 * first['level']:g} % "
            "interval"]


def compare(predictions: Sequence[dict[str, Any]], rows: Sequence[Row]) -> Compared:
  """Matches predictions with the rows of the same identity. Raises FieldError if there are none."""
  require(bool(predictions), "predictions", 0, "has no predictions")
  by_identity = {row.get("identity"): row for row in rows}
  measured, missing = [], []
  for one in predictions:
    row = by_identity.get(one["identity"])
    if row is None:
      missing.append((one, "not run"))
    elif UNUSED in row:
      missing.append((one, str(row[UNUSED])))
    else:
      measured.append((one, float(row["loss"])))
  return Compared(tuple(measured), tuple(missing))
