"""Computes two-sided intervals for a fit's parameters: bootstrap and profile likelihood.

Errors of cells that share an architecture are correlated, so architectures are the resampling
unit. The bootstrap depends on the form:

- a log-log form with one cell per architecture: residual bootstrap of the t-statistic, with
  residuals scaled up by their leverage (plain percentile intervals are too short at the 10 to
  50 cells of a grid);
- a log-log form with several cells per architecture: wild cluster bootstrap of the t-statistic,
  with the cluster jackknife's standard error (CR3);
- any form, with either solver: subsamples of 80 % of the architectures without replacement. A
  subsample of m of G shares most of its data with the full set, so its deviations are too
  small by sqrt((G - m) / m): they are rescaled (the delete-d jackknife), and the interval uses
  Student's t.
"""

import dataclasses

import numpy as np

from moe_jax.laws import solvers
from moe_jax.laws.fit import Fit
from moe_jax.laws.information import degrees_of_freedom
from moe_jax.laws.solvers import Problem

DRAWS = 9_999
SUBSAMPLES, SUBSAMPLE = 200, 0.8  # number of subsamples, and fraction of architectures in each
MOST_WITHOUT = 0.1  # if more of the subsamples do not identify the form, there is no interval


@dataclasses.dataclass(frozen=True)
class Interval:
  """A two-sided interval; an infinite end means that the data do not bound it there."""

  estimate: float
  low: float
  high: float
  level: float
  method: str

  def covers(self, value: float) -> bool:
    return self.low <= value <= self.high

  def __str__(self) -> str:
    return (f"{self.estimate:+.4g} [{self.low:+.4g}, {self.high:+.4g}] "
            f"({100 * self.level:g} %, {self.method})")


def bootstrap(fitted: Fit, level: float = 0.95, draws: int = DRAWS,
              seed: int = 0) -> dict[str, Interval]:
  """Returns intervals of the least-squares estimates, by the bootstrap that suits the form."""
  if not fitted.form.is_linear:
    return subsample(fitted, level, min(SUBSAMPLES, draws), seed)
  rng = np.random.default_rng(seed)
  x_NP = fitted.form.matrix(fitted.cells)[0]
  one_each = fitted.cells.n_architectures == len(fitted.cells)
  # Residuals are drawn by position; sort, so that the order of the file's rows does not matter.
  order = np.lexsort([fitted.residual, *x_NP.T])
  error_P, t_BP = (_residual_t(x_NP[order], fitted.residual[order], draws, rng) if one_each else
                   _cluster_t(x_NP, fitted.residual, fitted.cells.architecture, draws, rng))
  quantile_P = np.quantile(np.abs(t_BP), level, axis=0)
  method = "residual bootstrap-t" if one_each else "cluster bootstrap-t"
  theta = fitted.least_squares.theta
  return {name: Interval(float(theta[p]), float(theta[p] - quantile_P[p] * error_P[p]),
                         float(theta[p] + quantile_P[p] * error_P[p]), level, method)
          for p, name in enumerate(fitted.parameters)}


def by_pair(fitted: Fit, draws: int = DRAWS, seed: int = 0) -> dict[str, Interval]:
  """Returns 95 % intervals of a log-log form with errors clustered by the pair (n_exp, s).

  Errors are shared this way if the law misses an effect of the routing that is common to all
  sizes. Empty for other forms, and if there are too few pairs or no fewer than architectures.
  """
  x = fitted.cells.columns
  if not (fitted.form.is_linear and {"n_exp", "sparsity"} <= set(x)):
    return {}
  pair_N = np.unique(np.stack([x["n_exp"], np.round(x["sparsity"], 6)], axis=1), axis=0,
                     return_inverse=True)[1].reshape(len(fitted.cells))
  n_pairs = pair_N.max() + 1
  if n_pairs >= fitted.cells.n_architectures or n_pairs < len(fitted.parameters) + 2:
    return {}
  return bootstrap(dataclasses.replace(
      fitted, cells=dataclasses.replace(fitted.cells, architecture=pair_N)), draws=draws, seed=seed)


def _residual_t(x_NP, residual_N, draws, rng) -> tuple[np.ndarray, np.ndarray]:
  """Returns standard errors [P] and bootstrapped t-statistics [B, P], exchangeable errors."""
  n, p = x_NP.shape
  inverse, solve_PN, leverage_N = _ols(x_NP)
  scaled = residual_N / np.sqrt(1 - leverage_N)
  error_BN = rng.choice(scaled - scaled.mean(), (draws, n))
  shift_BP = error_BN @ solve_PN.T
  left_BN = error_BN - shift_BP @ x_NP.T
  spread = np.sqrt(np.diag(inverse))
  errors_BP = np.sqrt((left_BN**2).sum(axis=1) / (n - p))[:, None] * spread
  return np.sqrt(residual_N @ residual_N / (n - p)) * spread, shift_BP / errors_BP


def _cluster_t(x_NP, residual_N, cluster_N, draws, rng) -> tuple[np.ndarray, np.ndarray]:
  """Like `_residual_t` for errors correlated within clusters: wild, Rademacher, CR3."""
  _, solve_PN, _ = _ols(x_NP)
  hat = x_NP @ solve_PN
  groups = [np.flatnonzero(cluster_N == g) for g in np.unique(cluster_N)]
  undo = np.zeros((len(cluster_N),) * 2)  # block-diagonal (I - H_gg)^-1
  for group in groups:
    block = np.eye(len(group)) - hat[np.ix_(group, group)]
    undo[np.ix_(group, group)] = np.linalg.pinv(block, rcond=1e-9)

  def errors(left_BN):
    full_BN = left_BN @ undo.T
    score_GBP = np.stack([full_BN[:, g] @ solve_PN[:, g].T for g in groups])
    return np.sqrt((score_GBP**2).sum(axis=0))

  sign_BG = rng.choice([-1.0, 1.0], (draws, len(groups)))
  sign_BN = sign_BG[:, np.unique(cluster_N, return_inverse=True)[1]]
  error_BN = (undo @ residual_N) * sign_BN
  shift_BP = error_BN @ solve_PN.T
  return errors(residual_N[None])[0], shift_BP / errors(error_BN - shift_BP @ x_NP.T)


def _ols(x_NP) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns (X'X)^-1, the solution matrix [P, N] and the leverages [N] (kept below 1)."""
  inverse = np.linalg.inv(x_NP.T @ x_NP)
  solve_PN = inverse @ x_NP.T
  leverage_N = np.einsum("np,pn->n", x_NP, solve_PN)
  return inverse, solve_PN, np.minimum(leverage_N, 0.999)


def subsample(fitted: Fit, level: float = 0.95, draws: int = SUBSAMPLES, seed: int = 0,
              solver: str = "least squares") -> dict[str, Interval]:
  """Returns intervals from refits on 80 % of the architectures, rescaled, for either solver.

  Subsamples that do not identify the form are skipped, and `method` reports how many. If their
  share exceeds MOST_WITHOUT, the ends are infinite.
  """
  from scipy import stats
  rng = np.random.default_rng(seed)
  center = (fitted.huber if solver == "huber" else fitted.least_squares).theta
  labels = np.unique(fitted.cells.architecture)
  m = min(len(labels) - 1, round(SUBSAMPLE * len(labels)))
  whole = fitted.problem
  theta_BP = []
  for _ in range(draws):
    chosen = rng.choice(labels, m, replace=False)
    theta_P = _on_part(whole, np.isin(fitted.cells.architecture, chosen), center, solver)
    if theta_P is not None:
      theta_BP.append(theta_P)
  without = draws - len(theta_BP)
  method = f"{solver}, rescaled subsamples" + (
      f", {without} of {draws} of which do not identify the form" if without else "")
  scale = np.sqrt(m / (len(labels) - m))
  with np.errstate(over="ignore"):  # a refit that diverged makes the interval infinite
    error_P = (np.full(len(center), np.inf) if without > MOST_WITHOUT * draws else
               scale * np.sqrt(np.mean((np.array(theta_BP) - center)**2, axis=0)))
  df = degrees_of_freedom(len(fitted.cells), len(fitted.parameters), len(labels))
  width_P = stats.t.ppf((1 + level) / 2, df) * error_P
  return {name: Interval(float(center[p]), float(center[p] - width_P[p]),
                         float(center[p] + width_P[p]), level, method)
          for p, name in enumerate(fitted.parameters)}


def _on_part(whole: Problem, part: np.ndarray, center: np.ndarray,
             solver: str) -> np.ndarray | None:
  """Refits to the cells of a mask: theta [P], or None if they do not identify the form."""
  problem = Problem(whole.form, whole.m_KNP[:, part], whole.y_N[part])
  phi = problem.to_phi @ center
  if np.linalg.matrix_rank(problem.jacobian(phi)) < len(phi):
    return None  # least squares would return the minimum-norm solution
  if solver == "huber":
    return problem.to_theta @ solvers.huber_from(problem, phi, max_iterations=500)[0]
  return problem.to_theta @ solvers.least_squares(problem, phi)


def profile(fitted: Fit, level: float = 0.95) -> dict[str, Interval]:
  """Returns profile-likelihood intervals of the least-squares estimates, cells independent.

  An interval holds all values of a parameter for which the residual sum of squares, minimized
  over the other parameters, stays below RSS (1 + t² / (n - P)). For a log-log form this is
  Student's t interval, exact under normal errors.
  """
  from scipy import stats
  problem = fitted.problem
  theta = fitted.least_squares.theta
  n, k = len(fitted.cells), len(theta)
  quantile = stats.t.ppf((1 + level) / 2, max(1, n - k))
  j_NP = problem.jacobian(problem.to_phi @ theta) @ problem.to_phi
  rss = float(np.sum(fitted.residual**2))
  # In a direction the data do not constrain, the inverse is only rounding error, of either sign.
  inverse_P = np.diag(np.linalg.pinv(j_NP.T @ j_NP))
  error_P = np.sqrt(np.where(inverse_P > 0, inverse_P, np.inf) * rss / max(1, n - k))
  found = {}
  for p, (name, error) in enumerate(zip(fitted.parameters, error_P, strict=True)):
    if not np.isfinite(error):
      ends = -np.inf, np.inf
    elif fitted.form.is_linear or error == 0:
      ends = theta[p] - quantile * error, theta[p] + quantile * error
    else:
      ends = tuple(_profile_end(problem, theta, p, side * error, rss, quantile**2 / (n - k))
                   for side in (-1, 1))
    found[name] = Interval(float(theta[p]), float(ends[0]), float(ends[1]), level,
                           "profile likelihood")
  return found


def _profile_end(problem: Problem, theta, p: int, step: float, rss: float,
                 excess: float) -> float:
  """Finds where the profile exceeds RSS (1 + excess); infinite if it does not within 50 steps."""
  import scipy.optimize
  free = np.arange(len(theta)) != p

  def profiled(distance, start):
    at = theta.copy()

    def residual(others):
      at[p], at[free] = theta[p] + distance * step, others
      return problem.residual(problem.to_phi @ at)

    def jacobian(_):
      return (problem.jacobian(problem.to_phi @ at) @ problem.to_phi)[:, free]

    found = scipy.optimize.least_squares(residual, start, jacobian, method="lm",
                                         x_scale="jac", max_nfev=100)
    return 2 * found.cost / rss - 1 - excess, found.x

  near, others, far = 0.0, theta[free], 1.0
  while True:
    above, found = profiled(far, others)
    if above >= 0:
      break
    near, others, far = far, found, 1.6 * far
    if far > 50:
      return np.sign(step) * np.inf
  for _ in range(12):  # bisection; every refit starts from the inner point
    middle = (near + far) / 2
    above, found = profiled(middle, others)
    if above < 0:
      near, others = middle, found
    else:
      far = middle
  return theta[p] + step * (near + far) / 2
