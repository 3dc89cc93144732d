"""Computes how precisely a grid, run or planned, estimates the coefficients of a form.

    ln L of a cell = form + u + e

u is a random effect of the architecture: the part of its loss that the form misses. All cells of
an architecture share it, and repeats do not average it out. e is the noise between seeds, divided
by sqrt(seeds) in a cell that is the mean of several. Cells of one architecture at several token
counts share u but not e; branches of one trunk also share part of e, which is not modeled.

Variances are those of unweighted least squares, as moe_jax.laws.fit uses:
(X'X)^-1 X'VX (X'X)^-1 with V the covariance of u + e.
"""

import dataclasses

import numpy as np

from moe_jax.errors import FieldError, require
from moe_jax.laws.cells import Cells
from moe_jax.laws.fit import Fit
from moe_jax.laws.forms import Form, log_sum


@dataclasses.dataclass(frozen=True)
class Noise:
  """Standard deviations of ln L, i.e. as fractions of the loss.

  Attributes:
    seed: standard deviation between seeds of one cell.
    architecture: standard deviation of the architecture effect that the form misses.
    seed_source, architecture_source: a phrase saying where each comes from.
  """

  seed: float
  architecture: float
  seed_source: str = "given"
  architecture_source: str = "given"

  def __post_init__(self):
    for name in ("seed", "architecture"):
      value = getattr(self, name)
      require(0 <= value < 1, f"{name}_sd", value, "must be a fraction of the loss, at least "
              "0 and below 1")
    require(self.seed + self.architecture > 0, "seed_sd", self.seed,
            "and architecture_sd must not both be 0: without noise any grid suffices")

  def __str__(self) -> str:
    return (f"between seeds {100 * self.seed:.3g} % of the loss ({self.seed_source}), between "
            f"architectures {100 * self.architecture:.3g} % ({self.architecture_source})")


@dataclasses.dataclass(frozen=True)
class Design:
  """The design matrix of a grid and its error structure: N cells, P parameters.

  Attributes:
    parameters: the P names.
    x_NP: derivative of ln L with respect to each parameter.
    architecture_N: architecture index of each cell.
    seeds_N: number of runs averaged into each cell.
  """

  parameters: tuple[str, ...]
  x_NP: np.ndarray
  architecture_N: np.ndarray
  seeds_N: np.ndarray

  def errors_shared(self) -> np.ndarray:
    """Returns [N, N], 1 where two cells have the same architecture and 0 elsewhere."""
    return (self.architecture_N[:, None] == self.architecture_N).astype(float)

  def covariance(self, noise: Noise) -> np.ndarray:
    """Covariance of the least-squares estimates, [P, P]; columns of x_NP must be independent."""
    solve_PN = np.linalg.pinv(self.x_NP)
    return solve_PN @ self.errors(noise) @ solve_PN.T

  def pooled_covariance(self, noise: Noise) -> np.ndarray:
    """Expected covariance estimate of moe_jax.laws where every cell is its own architecture.

    That estimate assumes one variance for all cells: E[RSS] / (N - P) = tr((I - H) V) / (N - P).
    """
    n, p = self.x_NP.shape
    solve_PN = np.linalg.pinv(self.x_NP)
    left = np.trace(self.errors(noise)) - np.trace(self.x_NP @ solve_PN @ self.errors(noise))
    return left / (n - p) * solve_PN @ solve_PN.T

  def degrees_of_freedom(self, noise: Noise, contrast_P: np.ndarray) -> float:
    """Degrees of freedom of the estimated standard error of contrast_P @ theta.

    N - P where every cell is an architecture of its own. Otherwise the far fewer ones of the
    cluster jackknife, which estimates the error from sums over architectures: Bell and
    McCaffrey's (2002) Satterthwaite approximation, (sum of the eigenvalues)² / (sum of their
    squares) of the covariance of these sums.
    """
    n, p = self.x_NP.shape
    labels = np.unique(self.architecture_N)
    if len(labels) == n:
      return n - p
    solve_PN = np.linalg.pinv(self.x_NP)
    left_NN = np.eye(n) - self.x_NP @ solve_PN
    weight_N = contrast_P @ solve_PN
    sums = [left_NN[:, group] @ np.linalg.pinv(left_NN[np.ix_(group, group)], rcond=1e-9)
            @ weight_N[group] for group in (self.architecture_N == label for label in labels)]
    covariance_GG = np.array(sums) @ self.errors(noise) @ np.array(sums).T
    return max(1.0, float(np.trace(covariance_GG)**2 / np.sum(covariance_GG**2)))

  def errors(self, noise: Noise) -> np.ndarray:
    """Covariance of u + e, [N, N]."""
    return (noise.architecture**2 * self.errors_shared()
            + np.diag(noise.seed**2 / self.seeds_N))

  def standard_errors(self, noise: Noise) -> dict[str, float]:
    errors = np.sqrt(np.diag(self.covariance(noise)))
    return dict(zip(self.parameters, errors.tolist(), strict=True))


def degrees_of_freedom(n: int, p: int, n_architectures: int) -> int:
  """Returns min(cells - parameters, architectures - 1), at least 1."""
  return max(1, min(n - p, n_architectures - 1))


def design_of(form: Form, cells: Cells, theta_P: np.ndarray | None = None) -> Design:
  """Builds the design of these cells for a form.

  Args:
    form: a form whose parameters the cells all identify (see moe_jax.laws.identify).
    cells: the cells; their losses are not used.
    theta_P: where to evaluate the derivatives; a log-log form does not need it.

  Raises:
    FieldError: the form is not log-log and theta_P is None.
  """
  if theta_P is None and not form.is_linear:
    raise FieldError("law", form.name, "is not log-log: the information in a grid depends on "
                     "its coefficients, so it needs results to fit them to")
  m_KNP = form.matrix(cells)
  z_KN = m_KNP @ (np.zeros(m_KNP.shape[2]) if theta_P is None else theta_P)
  x_NP = np.einsum("kn,knp->np", np.exp(z_KN - log_sum(z_KN)), m_KNP)
  return Design(form.parameters, x_NP, cells.architecture, cells.seeds)


def noise_of(fitted: Fit, seed_sd: float | None = None) -> tuple[float, float]:
  """Estimates (SD between seeds, SD between architectures) of ln L from a fitted grid.

  The SD between seeds comes from repeated runs. The SD between architectures comes from the rest
  of the RSS by the method of moments, E[RSS] = tr(R V) with R = I - H, truncated at 0. It
  therefore includes any effect that the form lacks. A fit has more cells than parameters, so a
  residual always exists.

  Args:
    fitted: the fit.
    seed_sd: overrides the estimate from repeats; required if no cell was repeated.
  """
  design = design_of(fitted.form, fitted.cells, fitted.least_squares.theta)
  seed = fitted.cells.seed_noise if seed_sd is None else seed_sd
  r_NN = np.eye(len(fitted.cells)) - design.x_NP @ np.linalg.pinv(design.x_NP)
  of_seeds = seed**2 * np.sum(np.diag(r_NN) / design.seeds_N)
  left = float(np.sum(fitted.residual**2)) - of_seeds
  return seed, float(np.sqrt(max(0.0, left / np.sum(r_NN * design.errors_shared()))))
