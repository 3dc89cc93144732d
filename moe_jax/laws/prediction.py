"""Predicts a fitted law's curve along one variable with a confidence band, for plots.

The band is a delete-one-architecture jackknife: the variance of the prediction is (G - 1) / G
times the sum of squared deviations of the refits from the full fit. For a log-log form that is
CR3, robust to errors shared by an architecture's cells. It is a confidence band for the mean, not
a prediction band for a further run.
"""

import dataclasses

import numpy as np

from moe_jax.errors import FieldError
from moe_jax.laws.cells import Cells
from moe_jax.laws.fit import Fit
from moe_jax.laws.information import degrees_of_freedom
from moe_jax.laws.power import t_quantile
from moe_jax.laws.validate import LeftOut


@dataclasses.dataclass(frozen=True)
class Band:
  """Predicted losses [n] and the ends of their two-sided 95 % interval."""

  loss: np.ndarray
  low: np.ndarray
  high: np.ndarray


def reference(cells: Cells, column: str) -> float:
  """Returns the lower median of a column: a value that occurs in the grid."""
  values = np.sort(cells.columns[column])
  return float(values[(len(values) - 1) // 2])


def points(fitted: Fit, **columns: np.ndarray) -> Cells:
  """Returns cells with these columns, and the form's other columns at their `reference`."""
  (n,) = {np.size(values) for values in columns.values()}
  held = {name: reference(fitted.cells, name) for name in fitted.identified.asked.columns
          if name not in columns}
  return Cells.of(np.ones(n), **held, **columns)


def band(fitted: Fit, parts: list[LeftOut], at: Cells) -> Band:
  """Predicts the law's losses at some cells, with their 95 % confidence interval.

  Args:
    fitted: the fitted law.
    parts: the refits from validate.leave_one_architecture_out.
    at: the cells to predict.

  Raises:
    FieldError: the law cannot be refitted without one of the architectures.
  """
  if not parts or any(part.theta is None for part in parts):
    raise FieldError("cells", len(fitted.cells), "cannot be refitted without one of the "
                     "architectures, so the curve has no interval")
  center = fitted.log_loss(at)
  around = np.array([fitted.form.log_loss(part.theta, at) for part in parts])
  g = len(parts)
  error = np.sqrt((g - 1) / g * np.sum((around - center)**2, axis=0))
  df = degrees_of_freedom(len(fitted.cells), len(fitted.parameters), g)
  width = t_quantile(df) * error
  return Band(np.exp(center), np.exp(center - width), np.exp(center + width))
