"""Fits a form to cells: checks identifiability first, then runs two solvers side by side."""

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

_VANISHED = 1e-4  # a term of a smaller share of every loss is 0 for all that the data tell
_HELPS = (("n_total",), ("n_active",), ("tokens",))  # increasing these should lower the loss


@dataclasses.dataclass(frozen=True)
class Fit:
  """A fitted law.

  Attributes:
    identified: the design-matrix report, with the form that was fitted.
    cells: the cells it was fitted to.
    least_squares: solution by variable projection; for a log-log form, by ordinary least squares.
    huber: solution that minimizes the Huber loss in log space.
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
    """Measured ln L minus the least-squares fit, [n]."""
    return self.cells.log_loss - self.log_loss(self.cells)

  @property
  def scatter(self) -> float:
    """Residual standard deviation of ln L, with n - P degrees of freedom."""
    df = max(1, len(self.cells) - len(self.parameters))
    return float(np.sqrt(np.sum(self.residual**2) / df))

  @property
  def scatter_of_one_run(self) -> float:
    """Like `scatter`, but for the ln L of a single run where cells are means over seeds."""
    noise = self.cells.seed_noise
    averaged = 0.0 if np.isnan(noise) else noise**2 * np.mean(1 - 1 / self.cells.seeds)
    return float(np.sqrt(self.scatter**2 + max(0.0, averaged)))

  @property
  def doubts(self) -> tuple[str, ...]:
    """Reasons, one per line, to distrust the fit even inside the range of the data."""
    return tuple(
        f"{name} = {self.value(name):.3g} means that the loss grows with {basis.columns[0]}: the "
        "data do not separate its term from the others" for term in self.form.terms
        for name, basis in term.items()
        if basis.columns in _HELPS and basis.sign < 0 and self.value(name) < 0)

  def log_loss(self, cells: Cells) -> np.ndarray:
    """Returns the ln L that the least-squares solution predicts for `cells`."""
    return self.form.log_loss(self.least_squares.theta, cells)

  def predict(self, shape: Shape, tokens: ArrayLike) -> Prediction:
    """Predicts the loss for a Shape of many models, as a published law does.

    Extrapolates outside the fitted range, adding a line for each variable that is outside it.
    """
    asked = self.cells_of(shape, tokens)
    outside = []
    for column in self.identified.asked.columns:
      x, fitted = asked.columns[column], self.cells.columns[column]
      for bad, end in ((x.min() < 0.999 * fitted.min(), f"{x.min():.4g} is below "
                        f"{fitted.min():.4g}, the minimum"),
                       (x.max() > 1.001 * fitted.max(), f"{x.max():.4g} is above "
                        f"{fitted.max():.4g}, the maximum")):
        if bad:
          outside.append(f"{column} = {end} in the data it was fitted to")
    return Prediction(self.form.name, np.exp(self.log_loss(asked)), LOSS,
                      (*outside, *self.doubts))

  @staticmethod
  def cells_of(shape: Shape, tokens: ArrayLike) -> Cells:
    """Converts shapes to n cells with a placeholder loss of 1."""
    names = ("n_layers", "d_model", "d_expert", "n_exp", "n_topk", "n_total", "n_active")
    columns = np.broadcast_arrays(np.atleast_1d(np.asarray(tokens, float)),
                                  *[np.asarray(getattr(shape, name), float) for name in names])
    n = len(columns[0])
    return Cells.of(np.ones(n), names=("asked",) * n,
                    **dict(zip(("tokens", *names), columns, strict=True)))

  def value(self, parameter: str) -> float:
    """Returns the least-squares estimate. Raises FieldError if it is not identified."""
    if parameter not in self.parameters:
      why = self.identified.refused.get(parameter, "is not a parameter of this form")
      raise FieldError("parameter", parameter, why)
    return float(self.least_squares.theta[self.parameters.index(parameter)])


def fit(cells: Cells, law: str, n_starts: int = solvers.N_STARTS, seed: int = 0) -> Fit:
  """Fits the form named `law`, without terms that the best fit puts at 0.

  An irreducible loss that the data do not show ends there, for instance. Its logarithm has no
  optimum then, and neither it nor a refit with it has an interval.

  Raises:
    FieldError: an unknown form, a variable that the data lack, too few cells, or a
      parameter that still equals its start.
  """
  fitted = fit_identified(identify(form_for(law, cells), cells), cells, n_starts, seed)
  while (reduced := _without_vanished(fitted)) is not None:
    fitted = fit_identified(reduced, cells, n_starts, seed)
  return fitted


def _without_vanished(fitted: Fit) -> Identified | None:
  """Returns what is identified without the terms that vanish in every cell; None if none does."""
  form, identified = fitted.form, fitted.identified
  z_KN = fitted.problem.m_KNP @ fitted.least_squares.theta
  share_KN = np.exp(z_KN - fitted.log_loss(fitted.cells))
  terms = tuple(term for term, share_N in zip(form.terms, share_KN, strict=True)
                if share_N.max() > _VANISHED)
  if len(terms) == len(form.terms):
    return None
  reduced = Form(form.name, form.formula, terms)
  refused = {p: "its term is 0 in the best fit, so the form is fitted without it"
             for p in form.parameters if p not in reduced.parameters}
  return dataclasses.replace(identified, form=reduced, refused=identified.refused | refused)


def fit_identified(identified: Identified, cells: Cells, n_starts: int = solvers.N_STARTS,
                   seed: int = 0) -> Fit:
  """Like `fit`, for a form already reduced to what the cells identify."""
  form = identified.form
  problem = Problem(form, form.matrix(cells), cells.log_loss)
  squares = solvers.variable_projection(problem, max(8, n_starts // 4), seed)
  robust = solvers.huber(problem, n_starts, seed, problem.to_phi @ squares.theta)
  return Fit(identified, cells, squares, robust)


def refit(fitted: Fit, cells: Cells) -> np.ndarray:
  """Refits the same form to other cells by least squares, warm-started from `fitted`.

  Returns:
    theta.

  Raises:
    FieldError: these cells do not identify the form.
  """
  form = fitted.form
  problem = Problem(form, form.matrix(cells), cells.log_loss)
  phi = problem.to_phi @ fitted.least_squares.theta
  if np.linalg.matrix_rank(problem.jacobian(phi)) < len(form.parameters):
    raise FieldError("cells", len(cells), f"do not identify {form.name}")
  return problem.to_theta @ solvers.least_squares(problem, phi)
