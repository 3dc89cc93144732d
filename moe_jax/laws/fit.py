"""Fits a form to cells: identify first, then two solvers side by side."""

import dataclasses

import numpy as np
from numpy.typing import ArrayLike

from moe_jax.errors import FieldError
from moe_jax.laws import solvers
from moe_jax.laws.cells import Cells
from moe_jax.laws.forms import Form, form_for
from moe_jax.laws.identify import Identified, identify
from moe_jax.laws.law import LOSS, Prediction
from moe_jax.laws.shape import Shape
from moe_jax.laws.solvers import Problem, Solution

_HELPS = (("n_total",), ("n_active",), ("tokens",))  # more of it lowers the loss


@dataclasses.dataclass(frozen=True)
class Fit:
  """A fitted law.

  Attributes:
    identified: the design-matrix report, and the form that was fitted.
    cells: what it was fitted to.
    least_squares: by variable projection; for a log-log form, least squares itself.
    huber: by the log-space Huber loss.
  """

  identified: Identified
  cells: Cells
  least_squares: Solution
  huber: Solution

  @property
  def form(self) -> Form:
    return self.identified.form

  @property
  def parameters(self) -> tuple[str, ...]:
    return self.form.parameters

  @property
  def problem(self) -> Problem:
    return Problem(self.form, self.form.matrix(self.cells), self.cells.log_loss)

  @property
  def residual(self) -> np.ndarray:
    """ln L measured - fitted by least squares, [n]."""
    return self.cells.log_loss - self.log_loss(self.cells)

  @property
  def scatter(self) -> float:
    """Standard deviation of the residuals of ln L, by their degrees of freedom n - P."""
    df = max(1, len(self.cells) - len(self.parameters))
    return float(np.sqrt(np.sum(self.residual**2) / df))

  @property
  def scatter_of_one_run(self) -> float:
    """The same around the law of a single run's ln L, where cells are means over seeds."""
    noise = self.cells.seed_noise
    averaged = 0.0 if np.isnan(noise) else noise**2 * np.mean(1 - 1 / self.cells.seeds)
    return float(np.sqrt(self.scatter**2 + max(0.0, averaged)))

  @property
  def doubts(self) -> tuple[str, ...]:
    """Why its answers may not be trusted even inside the range of the data, a line each."""
    return tuple(
        f"{name} = {self.value(name):.3g}: by it the loss grows with {basis.columns[0]}, so that "
        "the data do not tell it from the other terms" for term in self.form.terms
        for name, basis in term.items()
        if basis.columns in _HELPS and basis.sign < 0 and self.value(name) < 0)

  def log_loss(self, cells: Cells) -> np.ndarray:
    """Predicted ln L of other cells, by the least-squares solution."""
    return self.form.log_loss(self.least_squares.theta, cells)

  def predict(self, shape: Shape, tokens: ArrayLike) -> Prediction:
    """The fitted law's answer for a Shape of many, like a published law's.

    Outside the range of what it was fitted to it answers, with a line for each variable.
    """
    asked = self.cells_of(shape, tokens)
    outside = []
    for column in self.identified.asked.columns:
      x, fitted = asked.columns[column], self.cells.columns[column]
      for bad, end in ((x.min() < 0.999 * fitted.min(), f"{x.min():.4g} is below "
                        f"{fitted.min():.4g}"),
                       (x.max() > 1.001 * fitted.max(), f"{x.max():.4g} is above "
                        f"{fitted.max():.4g}")):
        if bad:
          outside.append(f"{column} = {end}, the range of the data it was fitted to")
    return Prediction(self.form.name, np.exp(self.log_loss(asked)), LOSS,
                      (*outside, *self.doubts))

  @staticmethod
  def cells_of(shape: Shape, tokens: ArrayLike) -> Cells:
    """Shapes as cells without a measured loss, [n]."""
    names = ("n_layers", "d_model", "d_expert", "n_exp", "n_topk", "n_total", "n_active")
    columns = np.broadcast_arrays(np.atleast_1d(np.asarray(tokens, float)),
                                  *[np.asarray(getattr(shape, name), float) for name in names])
    n = len(columns[0])
    return Cells.of(np.ones(n), names=("asked",) * n,
                    **dict(zip(("tokens", *names), columns, strict=True)))

  def value(self, parameter: str) -> float:
    """The least-squares estimate. Raises FieldError for one that is not identified."""
    if parameter not in self.parameters:
      why = self.identified.refused.get(parameter, "is no parameter of this form")
      raise FieldError("parameter", parameter, why)
    return float(self.least_squares.theta[self.parameters.index(parameter)])


def fit(cells: Cells, law: str, n_starts: int = solvers.N_STARTS, seed: int = 0) -> Fit:
  """Fits the form of that name.

  Raises:
    FieldError: an unknown form, a variable that the data lack, too few cells, or a
      parameter that was not optimised.
  """
  return fit_identified(identify(form_for(law, cells), cells), cells, n_starts, seed)


def fit_identified(identified: Identified, cells: Cells, n_starts: int = solvers.N_STARTS,
                   seed: int = 0) -> Fit:
  """The same for a form that has been reduced to what the cells identify."""
  form = identified.form
  problem = Problem(form, form.matrix(cells), cells.log_loss)
  squares = solvers.variable_projection(problem, max(8, n_starts // 4), seed)
  robust = solvers.huber(problem, n_starts, seed, problem.to_phi @ squares.theta)
  return Fit(identified, cells, squares, robust)


def refit(fitted: Fit, cells: Cells) -> np.ndarray:
  """theta of the same form on other cells, least squares from the first fit's answer.

  Raises:
    FieldError: these cells do not identify the form.
  """
  form = fitted.form
  problem = Problem(form, form.matrix(cells), cells.log_loss)
  phi = problem.to_phi @ fitted.least_squares.theta
  if np.linalg.matrix_rank(problem.jacobian(phi)) < len(form.parameters):
    raise FieldError("cells", len(cells), f"do not identify {form.name}")
  return problem.to_theta @ solvers.least_squares(problem, phi)
