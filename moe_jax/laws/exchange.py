"""Chooses which runs to add to a grid: greedy selection, then an exchange algorithm.

The criterion is the variance of the least-squares estimates. A run either opens a new cell or
repeats an existing one with another seed; a repeat averages out only the noise between seeds.
All candidates are scored at once: adding one changes X'X and X'VX by the outer products of its
row with itself and with the sum of its architecture's rows.
"""

import dataclasses

import numpy as np

from moe_jax.errors import require
from moe_jax.laws.information import Design, Noise, degrees_of_freedom
from moe_jax.laws.power import t_quantile

# Weight of the pseudo-measurements that keep X'X invertible while a grid is not yet identified.
_PRIOR = 1e-9
_MAX_PASSES = 20


@dataclasses.dataclass(frozen=True)
class Target:
  """What the added runs should estimate better: linear combinations of the parameters.

  Attributes:
    name: name in the report.
    contrast_QP: one combination per row.
    volume: minimize the volume of their joint confidence region (D-optimality) rather than
      their mean variance (c- and A-optimality).
  """

  name: str
  contrast_QP: np.ndarray
  volume: bool = False

  def log_variance(self, covariance_KPP: np.ndarray) -> np.ndarray:
    """Log of the mean variance, or of its geometric mean over the principal axes: [K]."""
    of_target = self.contrast_QP @ covariance_KPP @ self.contrast_QP.T
    if self.volume:
      return np.linalg.slogdet(of_target)[1] / len(self.contrast_QP)
    return np.log(np.trace(of_target, axis1=-2, axis2=-1) / len(self.contrast_QP))


@dataclasses.dataclass(frozen=True)
class Pool:
  """Every cell that has been run or could be.

  Attributes:
    design: all of them as rows; `seeds_N` is 0 for candidates that have not been run.
    cost_N: cost of one run of each cell, in any unit.
  """

  design: Design
  cost_N: np.ndarray


@dataclasses.dataclass(frozen=True)
class Choice:
  """Runs to add, best first.

  Attributes:
    added: rows of the pool; a row that appears twice is run with two seeds.
    half_width: half-width of the target's 95 % interval after the first 0, 1, ... of these runs:
      the root mean square over its combinations or, for a volume, the geometric mean over its
      axes, at the fewest degrees of freedom of any combination. Infinite if not identified.
    alone: the half-width with each of these runs added on its own.
  """

  added: tuple[int, ...]
  half_width: tuple[float, ...]
  alone: tuple[float, ...]


def choose(pool: Pool, noise: Noise, target: Target, n_add: int,
           budget: float = np.inf) -> Choice:
  """Chooses the runs that shrink the target's interval most.

  Without a budget, each greedy step takes the run with the largest gain; with one, the
  affordable run with the largest gain per unit of cost. Then runs are exchanged one at a time
  until no exchange within the budget helps.

  Args:
    pool: the cells to choose from.
    noise: the noise assumed in every cell.
    target: what to estimate better.
    n_add: the maximum number of runs, at least 1.
    budget: the maximum total cost (the caller's --flops).

  Raises:
    FieldError: the budget does not pay for a single run.
  """
  require(budget >= pool.cost_N.min(), "flops", budget,
          f"is too small for any run: the cheapest takes {pool.cost_N.min():.3g}")
  added = _grow(pool, noise, target, [], n_add, budget)
  for _ in range(_MAX_PASSES):
    before = list(added)
    for i in range(len(added)):
      rest = added[:i] + added[i + 1:]
      score_N = _scores(pool, noise, target, rest)
      score_N[pool.cost_N > budget - pool.cost_N[rest].sum()] = np.inf
      best = int(np.argmin(score_N))
      if score_N[best] < score_N[added[i]] - 1e-9:
        added[i] = best
    added = _grow(pool, noise, target, added, n_add, budget)
    if added == before:
      break
  ordered = _by_gain(pool, noise, target, added)
  return Choice(tuple(ordered),
                tuple(half_width(pool, noise, target, ordered[:i])
                      for i in range(len(ordered) + 1)),
                tuple(half_width(pool, noise, target, [j]) for j in ordered))


def half_width(pool: Pool, noise: Noise, target: Target, added: list[int]) -> float:
  """Half-width of the target's 95 % interval with these runs; infinite if not identified."""
  design = with_runs(pool, added)
  unseen = target.contrast_QP @ (
      np.eye(design.x_NP.shape[1]) - np.linalg.pinv(design.x_NP) @ design.x_NP)
  scale = np.abs(target.contrast_QP).max()
  n, p = design.x_NP.shape
  if np.abs(unseen).max() > 1e-6 * scale or n <= p:
    return np.inf
  variance = np.exp(target.log_variance(design.covariance(noise)[None])[0])
  df = min(design.degrees_of_freedom(noise, contrast_P) for contrast_P in target.contrast_QP)
  return float(np.sqrt(variance) * t_quantile(df))


def reported_half_width(pool: Pool, noise: Noise, target: Target, added: list[int]) -> float:
  """Half-width that the fit itself will report.

  Differs from `half_width` where every cell is an architecture of its own: the fit then assumes
  one variance for repeated and single cells.
  """
  design = with_runs(pool, added)
  n, p = design.x_NP.shape
  expected = half_width(pool, noise, target, added)
  if np.isinf(expected) or len(np.unique(design.architecture_N)) < n:
    return expected
  variance = np.exp(target.log_variance(design.pooled_covariance(noise)[None])[0])
  return float(np.sqrt(variance) * t_quantile(n - p))


def with_runs(pool: Pool, added: list[int]) -> Design:
  """Returns the design of the cells run so far plus these runs."""
  seeds_N = _seeds(pool, added)
  there = seeds_N > 0
  whole = pool.design
  return Design(whole.parameters, whole.x_NP[there], whole.architecture_N[there],
                seeds_N[there])


def _seeds(pool: Pool, added: list[int]) -> np.ndarray:
  return pool.design.seeds_N + np.bincount(added, minlength=len(pool.cost_N))


def _grow(pool, noise, target, added, n_add, budget) -> list[int]:
  """Adds runs greedily while they help and `n_add` and the budget allow."""
  added = list(added)
  while len(added) < n_add:
    affordable = pool.cost_N <= budget - pool.cost_N[added].sum()
    gain_N = _score(pool, noise, target, added) - _scores(pool, noise, target, added)
    if np.isfinite(budget):
      gain_N = gain_N / pool.cost_N
    gain_N[~affordable] = -np.inf
    if gain_N.max() <= 0:
      break
    added.append(int(np.argmax(gain_N)))
  return added


def _by_gain(pool, noise, target, added) -> list[int]:
  """Reorders the runs greedily: each is the one that helps most after those before it."""
  left, ordered = list(added), []
  while left:
    score_N = _scores(pool, noise, target, ordered)
    ordered.append(min(left, key=lambda j: score_N[j]))
    left.remove(ordered[-1])
  return ordered


def _normal_matrices(pool: Pool, noise: Noise, seeds_N: np.ndarray):
  """Returns X'X, X'VX and, for every row of the pool, the sum of its architecture's rows."""
  x_NP, there = pool.design.x_NP, seeds_N > 0
  prior_PP = np.diag(_PRIOR * np.mean(x_NP**2, axis=0))
  shared_NP = pool.design.errors_shared() @ (x_NP * there[:, None])
  run_NP = x_NP[there]
  a_PP = run_NP.T @ run_NP + prior_PP
  b_PP = (noise.architecture**2 * run_NP.T @ shared_NP[there]
          + noise.seed**2 * (run_NP / seeds_N[there, None]).T @ run_NP
          + (noise.architecture**2 + noise.seed**2) * prior_PP)
  return a_PP, b_PP, shared_NP


def _score(pool, noise, target, added) -> float:
  """Log of the squared half-width; finite even where only the prior bounds it.

  Uses the counted degrees of freedom, because Bell and McCaffrey's would be slow.
  """
  seeds_N = _seeds(pool, added)
  a_PP, b_PP, _ = _normal_matrices(pool, noise, seeds_N)
  there = seeds_N > 0
  inverse = np.linalg.inv(a_PP)
  df = degrees_of_freedom(int(there.sum()), len(a_PP),
                          len(np.unique(pool.design.architecture_N[there])))
  return float(target.log_variance((inverse @ b_PP @ inverse)[None])[0]
               + 2 * np.log(t_quantile(df)))


def _scores(pool, noise, target, added) -> np.ndarray:
  """Returns `_score` with each row of the pool added in turn to `added`: [N]."""
  design, seeds_N = pool.design, _seeds(pool, added)
  there, x_NP, p = seeds_N > 0, design.x_NP, design.x_NP.shape[1]
  a_PP, b_PP, shared_NP = _normal_matrices(pool, noise, seeds_N)
  xx_NPP = x_NP[:, :, None] * x_NP[:, None, :]
  xs_NPP = x_NP[:, :, None] * shared_NP[:, None, :]
  opened_NPP = (noise.architecture**2 * (xx_NPP + xs_NPP + xs_NPP.swapaxes(1, 2))
                + noise.seed**2 * xx_NPP)
  seeds_or_1 = np.where(there, seeds_N, 1)
  repeated_NPP = -(noise.seed**2 / (seeds_or_1 * (seeds_or_1 + 1)))[:, None, None] * xx_NPP
  new = ~there[:, None, None]
  inverse = np.linalg.inv(a_PP + new * xx_NPP)
  covariance = inverse @ (b_PP + np.where(new, opened_NPP, repeated_NPP)) @ inverse
  known = set(design.architecture_N[there].tolist())
  n, n_known = int(there.sum()), len(known)
  t = {pair: t_quantile(degrees_of_freedom(n + pair[0], p, n_known + pair[1]))
       for pair in ((0, 0), (1, 0), (1, 1))}
  t_N = np.array([t[int(not old), int(arch not in known)]
                  for old, arch in zip(there, design.architecture_N.tolist(), strict=True)])
  return target.log_variance(covariance) + 2 * np.log(t_N)
