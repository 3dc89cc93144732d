"""Estimates learning rates from sweeps: each sweep's optimum, and a law of the optima. No JAX.

    ln lr* = intercept + n_total ln N_total + sparsity ln s + n_exp ln n_exp
"""

import collections
import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from moe_jax.arch import count
from moe_jax.arch.architecture import Architecture
from moe_jax.errors import FieldError, require
from moe_jax.laws.reduce import by_learning_rate, check_repeats, shortest_name
from moe_jax.laws.table import ARCHITECTURE, LEFT_OUT, UNUSED, Row
from moe_jax.run_dir import DIVERGED, FAILED, FINISHED
from moe_jax.text import short

VARIABLES = ("n_total", "sparsity", "n_exp")
_AROUND = 2  # rates on either side of the best to fit the parabola to
_QUANTILE = 1.96  # normal, not Student's t: the noise is treated as known


@dataclasses.dataclass(frozen=True)
class Sweep:
  """One architecture and length at several learning rates.

  Attributes:
    cell: the shortest of the runs' names.
    variables: VARIABLES, as numbers.
    rates, log_loss, seeds: each rate that has a loss, ascending; its mean ln L over seeds; and
      the number of seeds.
    without_loss: rates whose runs ended without a usable loss, e.g. diverged or failed.
    awaited: rates whose runs have not ended.
    identities: identity hashes of all its runs.
  """

  cell: str
  variables: Mapping[str, float]
  rates: np.ndarray
  log_loss: np.ndarray
  seeds: np.ndarray
  without_loss: tuple[float, ...]
  awaited: tuple[float, ...]
  identities: tuple[str, ...]

  def __str__(self) -> str:
    known = self.variables
    return (f"{self.cell} (N_total {short(known['n_total'])}, s {known['sparsity']:g}, n_exp "
            f"{known['n_exp']:g})")


@dataclasses.dataclass(frozen=True)
class Optimum:
  """The learning rate that minimizes a sweep's loss.

  Attributes:
    sweep: the sweep.
    rate: the vertex of the parabola.
    low, high: its 95 % interval; 0 and infinity if the curvature is not significantly above 0.
    curvature: quadratic coefficient of the parabola, ln L per (ln rate)².
  """

  sweep: Sweep
  rate: float
  low: float
  high: float
  curvature: float

  def loss_above(self, rate: float) -> float:
    """Returns ln L at a rate minus ln L at the optimum, by the parabola."""
    return self.curvature * math.log(rate / self.rate)**2


@dataclasses.dataclass(frozen=True)
class Rates:
  """A law of the optimal learning rate; see the module's docstring."""

  coefficients: Mapping[str, float]

  def at(self, n_total: float, sparsity: float, n_exp: float) -> float:
    c = self.coefficients
    return math.exp(c["intercept"] + c["n_total"] * math.log(n_total)
                    + c["sparsity"] * math.log(sparsity) + c["n_exp"] * math.log(n_exp))

  def of(self, arch: Architecture) -> float:
    """Returns an architecture's rate; rounded, as it is part of a run's identity and name."""
    return float(f"{self.at(count.n_total(arch), arch.sparsity, arch.n_exp):.3g}")


def read(path: str | os.PathLike, field: str = "rates") -> Rates:
  """Reads a file of moe_jax.study.learning_rate. Raises FieldError, naming `field`."""
  try:
    found = json.loads(pathlib.Path(path).read_text())["coefficients"]
    return Rates({name: float(found[name]) for name in ("intercept", *VARIABLES)})
  except OSError as error:
    raise FieldError(field, str(path), f"cannot be read: {error.strerror}") from None
  except (ValueError, KeyError, TypeError):
    raise FieldError(field, str(path), "is damaged: it needs the coefficients intercept, "
                     + ", ".join(VARIABLES)) from None


def sweeps_of(rows: Sequence[Row], source: str) -> list[Sweep]:
  """Returns a sweep for each architecture and length with several rates, in table order.

  Rows excluded by flags are skipped; failed and unfinished runs are not.

  Raises:
    FieldError: there is no sweep, or runs of one differ in more than seed and learning rate.
  """
  groups: dict[tuple, list[Row]] = collections.defaultdict(list)
  for row in rows:
    if not str(row.get(UNUSED)).startswith(LEFT_OUT):
      groups[tuple(row[name] for name in (*ARCHITECTURE, "tokens"))].append(row)
  found = []
  for group in groups.values():
    if len({row["learning_rate"] for row in group}) > 1:
      check_repeats([row for row in group if UNUSED not in row], source)
      found.append(_sweep(group))
  require(bool(found), "results", source, "has no architecture with several learning rates")
  return found


def _sweep(group: list[Row]) -> Sweep:
  losses = by_learning_rate([row for row in group if UNUSED not in row])
  without = {row["learning_rate"] for row in group
             if row["state"] in (FINISHED, DIVERGED, FAILED)} - set(losses)
  awaited = {row["learning_rate"] for row in group} - without - set(losses)
  row = group[0]
  variables = {"n_total": row["n_total"], "sparsity": row["n_exp"] / row["n_topk"],
               "n_exp": row["n_exp"]}
  return Sweep(shortest_name(group), variables,
               np.array(list(losses)), np.array([np.mean(each) for each in losses.values()]),
               np.array([len(each) for each in losses.values()]), tuple(sorted(without)),
               tuple(sorted(awaited)), tuple(str(row.get("identity", "")) for row in group))


def optimum(sweep: Sweep, seed_sd: float) -> Optimum:
  """Returns the vertex of a parabola fitted to the best rate and up to two on either side.

  Args:
    sweep: a sweep with at least three rates.
    seed_sd: standard deviation of ln L between seeds.

  Raises:
    FieldError: fewer than three rates have a loss, the best rate is at an edge, or the parabola
      has no minimum within the fitted rates. The message says which rates to add.
  """
  rates, n = sweep.rates, len(sweep.rates)
  if n < 3:
    raise FieldError("results", str(sweep), f"has a loss at {n} rate{'s' * (n != 1)}: at "
                     "least three are needed")
  best, step = int(np.argmin(sweep.log_loss)), math.exp(np.diff(np.log(rates)).mean())
  if best in (0, n - 1):
    raise _edge(sweep, best, step)
  part = slice(max(0, best - _AROUND), best + _AROUND + 1)
  center = float(np.log(rates[part]).mean())
  u_N = np.log(rates[part]) - center
  x_NP = np.stack([np.ones_like(u_N), u_N, u_N**2], axis=1)
  solve_PN = np.linalg.pinv(x_NP)
  c = solve_PN @ sweep.log_loss[part]
  covariance_PP = seed_sd**2 * solve_PN @ np.diag(1 / sweep.seeds[part]) @ solve_PN.T
  if c[2] <= 0:
    raise FieldError("results", str(sweep), f"its losses at {n} rates have no minimum: add "
                     + _on_either_side(sweep, step))
  vertex = -c[1] / (2 * c[2])
  if not u_N[0] < vertex < u_N[-1]:  # the best rate is interior, so the losses are not a parabola
    between = np.sqrt(rates[best - 1:best + 1] * rates[best:best + 2])
    raise FieldError("results", str(sweep), f"is best at {_number(rates[best])}, but the parabola "
                     "through the rates around it has its minimum outside "
                     f"{_number(rates[part][0])} to {_number(rates[part][-1])}: add "
                     f"{_number(between[0])} and {_number(between[1])}, or seeds")
  gradient_P = np.array([0, -1 / (2 * c[2]), c[1] / (2 * c[2]**2)])
  half = _QUANTILE * math.sqrt(gradient_P @ covariance_PP @ gradient_P)
  if c[2] <= _QUANTILE * math.sqrt(covariance_PP[2, 2]):
    half = math.inf
  return Optimum(sweep, math.exp(center + vertex), math.exp(center + vertex - half),
                 math.exp(center + vertex + half) if half < 700 else math.inf, float(c[2]))


def _edge(sweep: Sweep, at: int, step: float) -> FieldError:
  """Returns an error that says how to extend a sweep whose best rate is at its edge."""
  rate, lowest = float(sweep.rates[at]), at == 0
  which = (f"is best at the {'lowest' if lowest else 'highest'} of {len(sweep.rates)} rates, "
           f"{_number(rate)}")
  awaited = [other for other in sweep.awaited if (other < rate) == lowest]
  if awaited:
    return FieldError("results", str(sweep), f"{which}, and rates beyond it have not run: first "
                      "run " + " and ".join(map(_number, awaited)))
  beyond = [other for other in sweep.without_loss if (other < rate) == lowest and other != rate]
  if beyond:  # a rate further out has no loss: suggest one in between
    next_to = max(beyond) if lowest else min(beyond)
    add, why = [math.sqrt(rate * next_to)], f"next to {_number(next_to)}, which has no loss"
  else:
    factors = (1 / step, 1 / step**2) if lowest else (step, step**2)
    add, why = [rate * factor for factor in factors], "the edge of the sweep"
  return FieldError("results", str(sweep), f"{which}, {why}: add "
                    + " and ".join(map(_number, sorted(add))))


def require_bounded(one: Optimum, seed_sd: float) -> None:
  """Raises FieldError if the optimum's interval is unbounded; says which rates to add."""
  sweep = one.sweep
  if not math.isfinite(one.high):
    step = math.exp(np.diff(np.log(sweep.rates)).mean())
    raise FieldError("results", str(sweep), f"is best at {_number(one.rate)}, which noise of "
                     f"{100 * seed_sd:.2g} % between seeds does not bound: add "
                     f"{_on_either_side(sweep, step)}, or seeds")


def _on_either_side(sweep: Sweep, step: float) -> str:
  return f"{_number(sweep.rates[0] / step)} and {_number(sweep.rates[-1] * step)}"


def _number(rate: float) -> str:
  return f"{rate:.4g}"


@dataclasses.dataclass(frozen=True)
class RateFit:
  """A law of the optimal learning rate fitted to optima.

  Attributes:
    rates: the law.
    errors: standard error of each coefficient; NaN without residual degrees of freedom.
    optima: the optima it was fitted to.
  """

  rates: Rates
  errors: Mapping[str, float]
  optima: tuple[Optimum, ...]

  def fitted(self, optimum: Optimum) -> float:
    return self.rates.at(**optimum.sweep.variables)

  @property
  def worst_factor(self) -> float:
    """The largest ratio between an optimum and the law's rate, in either direction."""
    return max(math.exp(abs(math.log(one.rate / self.fitted(one)))) for one in self.optima)


def fit_rates(optima: Sequence[Optimum], source: str) -> RateFit:
  """Fits the law by least squares in logs. Raises FieldError if the slopes are not identified."""
  logs = np.array([[math.log(one.sweep.variables[name]) for name in VARIABLES]
                   for one in optima])
  x_NP = np.column_stack([np.ones(len(logs)), logs])
  scaled = np.column_stack([x_NP[:, :1], logs - logs.mean(axis=0)])
  values = np.linalg.svd(scaled / np.maximum(np.linalg.norm(scaled, axis=0), 1e-12),
                         compute_uv=False)
  if len(optima) < 4 or values[-1] < 0.05:
    raise FieldError("results", source, f"its {len(optima)} sweeps do not separate the effects "
                     "of N_total, s and n_exp: sweep at corners that differ in each")
  y_N = np.log([one.rate for one in optima])
  theta = np.linalg.lstsq(x_NP, y_N, rcond=None)[0]
  df = len(optima) - len(theta)
  scatter = float(np.sum((y_N - x_NP @ theta)**2)) / df if df else math.nan
  errors = np.sqrt(scatter * np.diag(np.linalg.inv(x_NP.T @ x_NP)))
  names = ("intercept", *VARIABLES)
  return RateFit(Rates(dict(zip(names, theta.tolist(), strict=True))),
                 dict(zip(names, errors.tolist(), strict=True)), tuple(optima))
