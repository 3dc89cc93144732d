"""Two solvers for ln L = logsumexp(M_KNP @ theta), both on the residuals of ln L.

`huber`: minimizes the sum of Huber losses of the residuals (delta 1e-3) by L-BFGS from many
starts. The sum, not the mean, because the mean is so small that it meets L-BFGS's tolerance long
before the optimum. `variable_projection`: for given exponents, the terms' coefficients solve a
non-negative least-squares problem, so only the exponents are searched.

Both work in coordinates centered on the data's mean, which decouples a term's coefficient from
its exponents.
"""

import dataclasses

import numpy as np

from moe_jax.errors import FieldError
from moe_jax.laws.forms import Form, log_sum

DELTA = 1e-3
N_STARTS = 64
_UNMOVED = 1e-7
_MAX_ITERATIONS = 500  # of the linear Huber regression
_FLOOR_SHARE = 1e-6  # floor on coefficients, since log(0) is not finite


@dataclasses.dataclass(frozen=True)
class Solution:
  """The solution a solver found.

  Attributes:
    solver: the solver's name.
    theta: parameters [P].
    objective: mean Huber loss at delta 1e-3 of the residuals of ln L.
    rmse: root mean square of the residuals of ln L.
    starts: how many starts were tried.
    agreeing: how many of them ended within 0.1 % of the best objective.
  """

  solver: str
  theta: np.ndarray
  objective: float
  rmse: float
  starts: int
  agreeing: int


def huber_sum(residual_N: np.ndarray, delta: float = DELTA) -> float:
  """Returns the sum of Huber losses: r²/2 below delta, delta (|r| - delta/2) above."""
  size = np.abs(residual_N)
  return float(np.where(size < delta, size**2 / 2, delta * (size - delta / 2)).sum())


class Problem:
  """One form on one set of cells, in centered coordinates phi: theta = to_theta @ phi.

  The intercept of each term becomes the log of the term at the data's mean.
  """

  def __init__(self, form: Form, m_KNP: np.ndarray, log_loss_N: np.ndarray):
    self.form, self.m_KNP, self.y_N = form, m_KNP, log_loss_N
    to_phi = np.eye(m_KNP.shape[2])
    for k, i in enumerate(form.intercepts):
      to_phi[i] = m_KNP[k].mean(axis=0)
    self.to_phi = to_phi
    self.to_theta = np.linalg.inv(to_phi)
    self.centered_KNP = m_KNP @ self.to_theta

  def residual(self, phi: np.ndarray) -> np.ndarray:
    return log_sum(self.centered_KNP @ phi) - self.y_N

  def jacobian(self, phi: np.ndarray) -> np.ndarray:
    """d residual / d phi, [n, P]."""
    z_KN = self.centered_KNP @ phi
    weight_KN = np.exp(z_KN - log_sum(z_KN))
    return np.einsum("kn,knp->np", weight_KN, self.centered_KNP)

  def solution(self, solver: str, phi: np.ndarray, starts: int, agreeing: int) -> Solution:
    residual = self.residual(phi)
    return Solution(solver, self.to_theta @ phi, huber_sum(residual) / len(residual),
                    float(np.sqrt(np.mean(residual**2))), starts, agreeing)

  def starts(self, n: int, rng: np.random.Generator) -> np.ndarray:
    """Draws n starts [n, P]: exponents up to 1.2, and random shares of the mean loss per term."""
    intercepts = list(self.form.intercepts)
    share_nK = rng.dirichlet(np.ones(len(intercepts)), n)
    phi = np.empty((n, self.m_KNP.shape[2]))
    for p, name in enumerate(self.form.parameters):
      low = 0.02 if name in ("alpha", "beta", "gamma", "a") else -0.5
      phi[:, p] = rng.uniform(low, 1.2, n)
    phi[:, intercepts] = np.log(share_nK + 1e-3) + self.y_N.mean()
    return phi


def least_squares(problem: Problem, phi: np.ndarray, max_evaluations: int = 200) -> np.ndarray:
  """Least squares on the residuals of ln L: direct for a linear form, else iterative from `phi`.

  The iteration is Levenberg-Marquardt, or trust-region reflective if n < P.
  """
  import scipy.optimize
  if problem.form.is_linear:
    return np.linalg.lstsq(problem.centered_KNP[0], problem.y_N, rcond=None)[0]
  n, p = problem.centered_KNP.shape[1:]
  found = scipy.optimize.least_squares(
      problem.residual, phi, problem.jacobian, method="lm" if n >= p else "trf",
      x_scale="jac", xtol=1e-12, ftol=1e-14, gtol=1e-14, max_nfev=max_evaluations)
  return found.x


def huber_regression(x_NP: np.ndarray, y_N: np.ndarray) -> np.ndarray:
  """Linear Huber regression by iteratively reweighted least squares, started at least squares."""
  root_N = np.ones(len(y_N))
  beta = np.zeros(x_NP.shape[1])
  for _ in range(_MAX_ITERATIONS):
    last, beta = beta, np.linalg.lstsq(x_NP * root_N[:, None], y_N * root_N, rcond=None)[0]
    if np.max(np.abs(beta - last)) < 1e-10:
      break
    root_N = np.sqrt(np.minimum(1, DELTA / np.maximum(np.abs(y_N - x_NP @ beta), 1e-300)))
  return beta


def huber_from(problem: Problem, phi: np.ndarray,
               max_iterations: int = 3000) -> tuple[np.ndarray, float]:
  """Runs L-BFGS once on the summed Huber loss; returns (phi, the sum).

  A one-term form is linear in phi and is solved as a Huber regression instead.
  """
  import scipy.optimize
  if problem.form.is_linear:
    phi = huber_regression(problem.centered_KNP[0], problem.y_N)
    return phi, huber_sum(problem.residual(phi))

  def objective(at):
    residual = problem.residual(at)
    slope = np.clip(residual, -DELTA, DELTA)
    # In units of DELTA: the optimum is the same, and the tolerances are on a sensible scale.
    return huber_sum(residual) / DELTA, problem.jacobian(at).T @ slope / DELTA

  found = scipy.optimize.minimize(
      objective, phi, jac=True, method="L-BFGS-B",
      options=dict(maxiter=max_iterations, maxfun=4 * max_iterations, maxcor=30, ftol=1e-15,
                   gtol=1e-9))
  return found.x, float(found.fun) * DELTA


def huber(problem: Problem, n_starts: int = N_STARTS, seed: int = 0,
          extra_phi: np.ndarray | None = None) -> Solution:
  """Returns the best of many L-BFGS runs.

  Raises:
    FieldError: a parameter of the best run still equals its start.
  """
  if problem.form.is_linear:  # convex, so one start is enough
    start = least_squares(problem, np.zeros(problem.m_KNP.shape[2]))
    return problem.solution("huber", huber_from(problem, start)[0], 1, 1)
  starts = problem.starts(n_starts, np.random.default_rng(seed))
  runs = [huber_from(problem, start) for start in starts]
  values = np.array([value for _, value in runs])
  best = int(np.argmin(values))
  check_moved(problem.form, starts[best], runs[best][0])
  phi, value = runs[best]
  if extra_phi is not None:  # also start from the other solver's solution
    other, other_value = huber_from(problem, extra_phi)
    phi, value = (other, other_value) if other_value < value else (phi, value)
  agreeing = int(np.sum(values <= value * 1.001 + 1e-15))
  return problem.solution("huber", phi, n_starts, agreeing)


def check_moved(form: Form, start: np.ndarray, end: np.ndarray) -> None:
  """Raises FieldError if a fitted parameter still equals its start."""
  still = np.abs(end - start) <= _UNMOVED * (1 + np.abs(start))
  for p in np.flatnonzero(still):
    raise FieldError("law", form.name, f"{form.parameters[p]} still equals its "
                     f"starting value {start[p]:.6g} after the fit: it was not optimized")


def variable_projection(problem: Problem, n_starts: int = 16, seed: int = 0) -> Solution:
  """Searches the exponents, solving for the coefficients by non-negative least squares.

  The inner problem minimizes the squares of L / L_measured - 1; the result is then polished to
  the least-squares optimum of ln L, so that both solvers use the same residual.

  Raises:
    FieldError: a parameter of the best run still equals its start.
  """
  import scipy.optimize
  if problem.form.is_linear:
    phi = least_squares(problem, np.zeros(problem.m_KNP.shape[2]))
    return problem.solution("least squares", phi, 1, 1)
  intercepts = list(problem.form.intercepts)
  exponents = [p for p in range(problem.m_KNP.shape[2]) if p not in intercepts]

  def project(nu):
    z_KN = problem.centered_KNP[:, :, exponents] @ nu - problem.y_N
    basis_NK = np.exp(np.clip(z_KN, -300, 300)).T
    coefficients, _ = scipy.optimize.nnls(basis_NK, np.ones(len(basis_NK)))
    return coefficients, basis_NK @ coefficients - 1

  ends, values = [], []
  starts = problem.starts(n_starts, np.random.default_rng(seed))
  for start in starts:
    found = scipy.optimize.least_squares(
        lambda nu: project(nu)[1], start[exponents], x_scale=1.0, xtol=1e-10, ftol=1e-12,
        max_nfev=60)
    coefficients, _ = project(found.x)
    phi = np.empty(len(start))
    phi[exponents] = found.x
    phi[intercepts] = np.log(np.maximum(coefficients, _FLOOR_SHARE))
    ends.append(phi)
    values.append(2 * found.cost)
  best = int(np.argmin(values))
  phi = least_squares(problem, ends[best])
  check_moved(problem.form, starts[best], phi)
  agreeing = int(np.sum(np.array(values) <= values[best] * 1.001 + 1e-15))
  return problem.solution("variable projection", phi, n_starts, agreeing)
