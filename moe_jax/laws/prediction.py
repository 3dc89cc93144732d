"""What a fitted law says along a line through the data, with a band; for pictures.

The band is the delete-one-architecture jackknife's: refits without each architecture in turn,
whose spread around the whole, times (G - 1) / G, is the variance of the prediction; for a
log-log form that is CR3, robust to errors that an architecture's cells share. It is of the
mean, not of a further run.
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
  """A value of a column in the middle of the grid that occurs in it."""
  values = np.sort(cells.columns[column])
  return float(values[(len(values) - 1) // 2])


def points(fitted: Fit, **columns: np.ndarray) -> Cells:
  """Cells with these columns, all others that the form needs at their reference."""
  (n,) = {np.size(values) for values in columns.values()}
  held = {name: reference(fitted.cells, name) for name in fitted.identified.asked.columns
          if name not in columns}
  return Cells.of(np.ones(n), **held, **columns)


def band(fitted: Fit, parts: list[LeftOut], at: Cells) -> Band:
  """The law's losses at some cells, with their 95 % interval.

  Args:
    fitted: the law.
    parts: of validate.leave_one_architecture_out.
    at: where.

  Raises:
    FieldError: without one of the architectures the law cannot be fitted.
  """
  if not parts or any(part.theta is None for part in parts):
    raise FieldError("cells", len(fitted.cells), "cannot be fitted without one of the "
                     "architectures: no interval for the curve")
  centre = fitted.log_loss(at)
  around = np.array([fitted.form.log_loss(part.theta, at) for part in parts])
  g = len(parts)
  error = np.sqrt((g - 1) / g * np.sum((around - centre)**2, axis=0))
  df = degrees_of_freedom(len(fitted.cells), len(fitted.parameters), g)
  width = t_quantile(df) * error
  return Band(np.exp(centre), np.exp(centre - width), np.exp(centre + width))
