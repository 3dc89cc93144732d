"""Validates a fitted form: leave-one-out refits, extrapolation tests and rival forms."""

import dataclasses

import numpy as np

from moe_jax.errors import FieldError
from moe_jax.laws.cells import Cells
from moe_jax.laws.fit import Fit, fit, refit
from moe_jax.laws.identify import identify

_SAME_SIZE = np.log(1.1)


@dataclasses.dataclass(frozen=True)
class LeftOut:
  """A refit without some cells.

  Attributes:
    what: what was left out.
    theta: parameters [P] fitted to the rest; None if the rest does not identify them.
    error: measured minus predicted ln L of the cells left out, [n]; None if theta is None.
    refusal: why theta is None; empty if it is not.
    out: mask of the cells left out; None if none could be chosen.
  """

  what: str
  theta: np.ndarray | None
  error: np.ndarray | None
  refusal: str = ""
  out: np.ndarray | None = None


def leave_out(fitted: Fit, out: np.ndarray, what: str) -> LeftOut:
  """Refits without the cells of the mask `out`, and predicts them."""
  cells = fitted.cells
  rest = cells.take(~out)
  try:
    # A variable that hardly varies in the rest still gets a slope, but one fitted to noise.
    refused = identify(fitted.form, rest).refused
    if refused:
      return _impossible(what, f"the remaining cells do not identify {', '.join(refused)}: "
                         + "; ".join(dict.fromkeys(refused.values())), out)
    theta = refit(fitted, rest)
  except FieldError as error:
    return _impossible(what, error.accepted, out)
  left = cells.take(out)
  return LeftOut(what, theta, left.log_loss - fitted.form.log_loss(theta, left), out=out)


def _impossible(what: str, why: str, out: np.ndarray) -> LeftOut:
  return LeftOut(what, None, None, f"without {what} the form cannot be fitted: {why}", out)


def leave_one_architecture_out(fitted: Fit) -> list[LeftOut]:
  """Leaves out each architecture in turn, with all its cells."""
  labels = fitted.cells.architecture
  return [leave_out(fitted, labels == label,
                    fitted.cells.names[int(np.flatnonzero(labels == label)[0])])
          for label in np.unique(labels)]


def leave_one_value_out(fitted: Fit, column: str) -> list[LeftOut]:
  """Leaves out all cells of each value of a column in turn, e.g. n_exp."""
  values = fitted.cells.columns[column]
  return [leave_out(fitted, values == value, f"{column} {value:g}")
          for value in np.unique(values)] if len(np.unique(values)) > 1 else []


def extrapolate(fitted: Fit, column: str) -> LeftOut:
  """Holds out the cells with the largest value of a column (those within 10 % of it)."""
  logs = fitted.cells.log(column)
  out = logs > logs.max() - _SAME_SIZE
  if out.all():
    return LeftOut(f"the largest {column}", None, None, f"{column} has one value")
  return leave_out(fitted, out, f"{column} {np.exp(logs.max()):.4g}")


@dataclasses.dataclass(frozen=True)
class Rival:
  """One of several rival forms fitted to the same cells.

  Attributes:
    law: the form's name.
    n_parameters: number of identified parameters.
    rmse: RMSE of ln L on the cells it was fitted to.
    aicc: Akaike information criterion with the small-sample correction.
    bic: Bayesian information criterion.
    cv_rmse: leave-one-architecture-out RMSE of ln L; NaN if that cannot be done.
    cv_error: the mean squared error of each architecture left out; None if cv_rmse is NaN.
    n_exp_rmse: RMSE of ln L leaving out one value of n_exp at a time; NaN if not possible.
    refusal: why it could not be fitted; empty if it could.
  """

  law: str
  n_parameters: int = 0
  rmse: float = np.nan
  aicc: float = np.nan
  bic: float = np.nan
  cv_rmse: float = np.nan
  cv_error: np.ndarray | None = None
  n_exp_rmse: float = np.nan
  refusal: str = ""


def compare(cells: Cells, laws: list[str]) -> list[Rival]:
  """Compares forms by information criteria and by cross-validation over architectures."""
  return [_rival(cells, law) for law in laws]


def _rival(cells: Cells, law: str) -> Rival:
  try:
    fitted = fit(cells, law, n_starts=16)
  except FieldError as error:
    return Rival(law, refusal=str(error))
  n, k = len(cells), len(fitted.parameters) + 1  # + 1 for the noise variance
  deviance = n * np.log(max(np.mean(fitted.residual**2), 1e-30))
  small = 2 * k * (k + 1) / (n - k - 1) if n > k + 1 else np.inf
  rival = Rival(law, k - 1, float(np.sqrt(np.mean(fitted.residual**2))),
                float(deviance + 2 * k + small), float(deviance + k * np.log(n)),
                n_exp_rmse=_rmse(leave_one_value_out(fitted, "n_exp")
                                 if "n_exp" in cells.columns else []))
  parts = leave_one_architecture_out(fitted)
  if any(part.error is None for part in parts):
    return rival
  return dataclasses.replace(
      rival, cv_rmse=_rmse(parts),
      cv_error=np.array([np.mean(part.error**2) for part in parts]))


def _rmse(parts: list[LeftOut]) -> float:
  """Returns the RMSE over all cells left out; NaN if a part could not be predicted."""
  if not parts or any(part.error is None for part in parts):
    return np.nan
  return float(np.sqrt(np.mean(np.concatenate([part.error for part in parts])**2)))


def cv_difference(one: Rival, other: Rival) -> tuple[float, float]:
  """Mean squared prediction error of `one` minus that of `other`, and its standard error.

  The difference is paired by architecture, since the same ones are easy or hard for both forms.

  Raises:
    FieldError: either form could not be cross-validated.
  """
  for rival in (one, other):
    if rival.cv_error is None:
      raise FieldError("law", rival.law, "could not be cross-validated on these data")
  difference = one.cv_error - other.cv_error
  return float(difference.mean()), float(difference.std(ddof=1) / np.sqrt(len(difference)))


@dataclasses.dataclass(frozen=True)
class NestedTest:
  """An F-test of a form against one that it contains."""

  small: str
  large: str
  f: float
  df: tuple[int, int]
  p_value: float


def f_test(small: Fit, large: Fit) -> NestedTest:
  """F-test of whether the large form explains more than its extra parameters would by chance.

  Treats cells as independent.

  Raises:
    FieldError: different cells, no extra parameter, or no residual degrees of freedom.
  """
  from scipy import stats
  extra = len(large.parameters) - len(small.parameters)
  df = len(large.cells) - len(large.parameters)
  if extra < 1 or df < 1 or len(small.cells) != len(large.cells):
    raise FieldError("law", large.form.name, f"cannot be tested against {small.form.name}: "
                     "these data identify no further parameter, or leave no degrees of freedom")
  rss_small, rss_large = (float(np.sum(f.residual**2)) for f in (small, large))
  f = max(0.0, rss_small - rss_large) / extra / (rss_large / df)
  return NestedTest(small.form.name, large.form.name, f, (extra, df),
                    float(stats.f.sf(f, extra, df)))
