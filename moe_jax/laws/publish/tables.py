"""Builds the tables of a report."""

import numpy as np

from moe_jax.laws.analysis import Analysis
from moe_jax.laws.cells import Cells
from moe_jax.laws.forms import ONE
from moe_jax.laws.publish.table import Table
from moe_jax.laws.table import UNUSED

_SHAPE = ("n_layers", "d_model", "d_expert", "n_exp", "n_topk", "sparsity", "granularity",
          "n_total", "n_active", "tokens")


def cell_table(found: Analysis) -> Table:
  """One row per cell: its shape, its loss, the fitted loss and the runs behind it."""
  cells = found.cells
  shown = [name for name in _SHAPE if name in cells.columns]
  fitted = np.exp(found.fitted.log_loss(cells))
  runs = cells.runs or ((),) * len(cells)
  rows = [(cells.names[i], *[float(cells.columns[name][i]) for name in shown],
           float(cells.loss[i]), float(cells.loss_se[i]), float(fitted[i]),
           float(100 * np.expm1(found.fitted.residual[i])), len(runs[i]) or None,
           " ".join(str(row.get("identity") or "") for row in runs[i]).strip())
          for i in range(len(cells))]
  return Table(("cell", *shown, "loss", "standard error", "fitted", "missed by, %", "runs",
                "identities"), tuple(rows))


def run_table(cells: Cells) -> Table:
  """One row per run, including those in no cell, with the reason."""
  rows = [_run(row, "") for runs in cells.runs for row in runs]
  rows += [_run(row, row[UNUSED]) for row in cells.unused]
  return Table(("run", "identity", "learning rate", "seed_init", "seed_data", "tokens", "loss",
                "not used, because"), tuple(rows))


def _run(row, why: str) -> tuple:
  numbers = [row.get(name) for name in ("learning_rate", "seed_init", "seed_data", "tokens",
                                        "loss")]
  return (row["cell"], row.get("identity"), *[_number(value) for value in numbers], why)


def _number(value) -> float | None:
  try:
    return float(value)
  except (TypeError, ValueError):
    return None


def design_table(found: Analysis) -> Table:
  """One row per requested coefficient: its variable's range, and whether it is identified."""
  identified, cells = found.fitted.identified, found.cells
  rows = []
  for term in identified.asked.terms:
    for name, basis in term.items():
      plain = len(basis.columns) == 1 and basis.sign
      values = cells.columns[basis.columns[0]] if plain else None
      low, high = ((None, None) if values is None else (float(values.min()),
                                                        float(values.max())))
      row = (name, "constant" if basis is ONE else basis.text.removeprefix("-"), low, high,
             f"REFUSED: {identified.refused[name]}" if name in identified.refused
             else "identified")
      if row not in rows:
        rows.append(row)
  rows += [(name, "", None, None, f"identified instead: {name} = {what}")
           for name, what in identified.combinations.items()]
  return Table(("coefficient", "of", "least", "most", "verdict"), tuple(rows))


def coefficient_table(found: Analysis) -> Table:
  """Estimates with three two-sided 95 % intervals; the first is the one to quote."""
  rows = []
  for name in found.fitted.parameters:
    if name in found.unbounded:
      rows.append((name, *(None,) * 8, "REFUSED: these data do not bound it"))
      continue
    first, second, third = found.headline[name], found.profile[name], found.huber[name]
    rows.append((name, first.estimate, first.low, first.high, second.low, second.high,
                 third.estimate, third.low, third.high, ""))
  return Table(("coefficient", "estimate", "95 % low", "95 % high", "profile low",
                "profile high", "Huber", "Huber low", "Huber high", "refused, because"),
               tuple(rows))


def rival_table(found: Analysis) -> Table:
  """One row per rival form: fit, information criteria, cross-validation."""
  rows = [(r.law, r.n_parameters or None, 100 * r.rmse, r.aicc, r.bic, 100 * r.cv_rmse,
           100 * r.n_exp_rmse, r.refusal) for r in found.rivals]
  return Table(("form", "coefficients", "rmse, %", "AICc", "BIC", "rmse without one "
                "architecture, %", "rmse without one n_exp, %", "refused, because"), tuple(rows))


def trust_table(found: Analysis) -> Table:
  """One row per refit: what was left out, the refitted coefficients and the prediction errors."""
  rows = []
  for part in (*found.n_exps, *found.architectures, *found.held_out):
    theta = (None,) * len(found.fitted.parameters) if part.theta is None else map(float, part.theta)
    error = (None, None) if part.error is None else (
        float(100 * np.mean(part.error)), float(100 * np.sqrt(np.mean(part.error**2))))
    n = None if part.out is None else int(np.sum(part.out))
    rows.append((part.what, n, *theta, *error, part.refusal))
  return Table(("left out", "cells", *found.fitted.parameters, "mean error, %", "rmse, %",
                "refused, because"), tuple(rows))
