"""What a fit says, as lines of text."""

import numpy as np

from moe_jax.errors import FieldError
from moe_jax.laws import claims, intervals, validate
from moe_jax.laws.cells import Cells
from moe_jax.laws.fit import Fit, fit
from moe_jax.laws.intervals import Interval
from moe_jax.laws.validate import LeftOut, Rival

# The rivals of a log-log form, and the pairs of which one contains the other.
RIVALS = ("paper", "paper-curved", "total-sparsity", "total-active")
NESTED = (("total-sparsity", "paper"), ("paper", "paper-curved"))


def report(cells: Cells, law: str, margin: float = claims.MARGIN, draws: int = 999,
           seed: int = 0) -> list[str]:
  """The whole report: data, design, fit, trust, and for the paper's law rivals and claims.

  Raises:
    FieldError: the law is unknown or cannot be fitted to these cells.
  """
  fitted = fit(cells, law, seed=seed)
  lines = [*_titled("data", cells.notes), *fitted.identified.lines()]
  lines += _titled("fit, two solvers on residuals of ln L", _fit_lines(fitted, draws, seed))
  lines += _titled("trust", _trust_lines(fitted))
  if fitted.identified.asked.is_linear:
    lines += _titled("rival forms", _rival_lines(cells))
    lines += _titled(f"claims of arXiv 2601.08215, margin {margin:g} a unit of ln",
                     _claim_lines(cells, margin, seed))
  return lines


def _titled(title: str, lines) -> list[str]:
  return [title] + ["  " + line for line in lines]


def _fit_lines(fitted: Fit, draws: int, seed: int) -> list[str]:
  first = intervals.bootstrap(fitted, draws=draws, seed=seed)
  second = intervals.profile(fitted)
  third = intervals.subsample(fitted, draws=max(100, draws // 5), seed=seed, solver="huber")
  lines = []
  for name in fitted.parameters:
    if not np.isfinite([second[name].low, second[name].high]).all():
      lines.append(f"{name:16s} REFUSED: these data do not bound it: 95 % profile likelihood "
                   f"from {second[name].low:+.4g} to {second[name].high:+.4g}")
      continue
    lines.append(f"{name:16s} {first[name]}")
    lines += [f"{'':16s} {other[name]}" for other in (second, third)]
    if not _overlap(first[name], third[name]):
      lines.append(f"{'':16s} the solvers disagree: outliers, or a form that does not fit")
  for found in (fitted.least_squares, fitted.huber):
    lines.append(f"{found.solver}: rmse {100 * found.rmse:.3g} % of the loss, mean Huber "
                 f"(delta 1e-3) {found.objective:.4g}; {found.agreeing} of {found.starts} "
                 "starts agree")
  if fitted.cells.n_architectures < len(fitted.cells):
    lines.append("several cells share an architecture: the profile likelihood counts them "
                 "as independent, the bootstrap does not")
  seeds = np.nanmean(fitted.cells.loss_se / fitted.cells.loss) if np.isfinite(
      fitted.cells.loss_se).any() else np.nan
  if seeds > 0:
    ratio = fitted.least_squares.rmse / seeds
    lines.append(f"residuals are {ratio:.2g} times the noise between seeds"
                 + (": the form misses something real" if ratio > 2 else ""))
  return lines


def _overlap(one: Interval, other: Interval) -> bool:
  return one.low <= other.high and other.low <= one.high


def _trust_lines(fitted: Fit) -> list[str]:
  lines = []
  for title, parts in (
      ("one architecture", validate.leave_one_architecture_out(fitted)),
      ("one n_exp", _if_there(fitted, "n_exp"))):
    good = [part for part in parts if part.theta is not None]
    lines += [part.refusal for part in parts if part.theta is None]
    if good:
      error = np.concatenate([part.error for part in good])
      lines.append(f"leaving {title} out: prediction rmse "
                   f"{100 * np.sqrt(np.mean(error**2)):.3g} % of the loss")
      lines += [_range_line(fitted, p, good) for p in range(len(fitted.parameters))]
  for column in ("n_total", "sparsity"):
    if column in fitted.cells.columns:
      lines.append(_extrapolation_line(validate.extrapolate(fitted, column), fitted))
  return lines


def _if_there(fitted: Fit, column: str) -> list[LeftOut]:
  return (validate.leave_one_value_out(fitted, column)
          if column in fitted.cells.columns else [])


def _range_line(fitted: Fit, p: int, parts: list[LeftOut]) -> str:
  values = np.array([part.theta[p] for part in parts])
  far = parts[int(np.argmax(np.abs(values - fitted.least_squares.theta[p])))].what
  return (f"  {fitted.parameters[p]:14s} {values.min():+.4g} to {values.max():+.4g}, moved "
          f"most by {far}")


def _extrapolation_line(part: LeftOut, fitted: Fit) -> str:
  if part.error is None:
    return f"extrapolation to {part.what}: none, {part.refusal}"
  mean, rmse = np.mean(part.error), np.sqrt(np.mean(part.error**2))
  return (f"extrapolation to {part.what} ({len(part.error)} cells held out): error "
          f"{100 * mean:+.3g} % of the loss on average, rmse {100 * rmse:.3g} % (fitted "
          f"cells {100 * fitted.least_squares.rmse:.3g} %)")


def _rival_lines(cells: Cells) -> list[str]:
  lines = []
  rivals = validate.compare(cells, list(RIVALS))
  for rival in rivals:
    lines.append(f"{rival.law:15s} " + (rival.refusal if rival.refusal else (
        f"{rival.n_parameters} parameters, rmse {100 * rival.rmse:.3g} %, AICc "
        f"{rival.aicc:.1f}, BIC {rival.bic:.1f}, cross-validated rmse "
        + ("none: a part does not identify it" if np.isnan(rival.cv_rmse)
           else f"{100 * rival.cv_rmse:.3g} %"))))
  lines += [_cv_line(rivals[0], other) for other in rivals[1:]]
  for small, large in NESTED:
    try:
      big = fit(cells, large)
      test = validate.f_test(fit(cells, small), big)
    except FieldError as error:
      lines.append(f"F-test of {large} against {small}: none, {error.accepted}")
      continue
    lines.append(f"F-test of {large} against {small}: F {test.f:.3g} on {test.df[0]} and "
                 f"{test.df[1]}, p = {test.p_value:.2g}")
    if {"c", "q"} <= set(big.parameters):
      lines.append(slope_line(big, test.p_value))
  return lines


def _cv_line(one: Rival, other: Rival) -> str:
  title = f"cross-validation of {one.law} against {other.law}: "
  try:
    mean, error = validate.cv_difference(one, other)
  except FieldError as refused:
    return f"{title}none, {refused}"
  if abs(mean) <= 2 * error:
    return title + "not told apart"
  better = one.law if mean < 0 else other.law
  return f"{title}{better} predicts better ({abs(mean) / error:.1f} standard errors)"


def slope_line(curved: Fit, p_value: float, slope: str = "c", variable: str = "sparsity") -> str:
  """Whether the slope along ln(variable) is constant, from a form with curvature q."""
  logs = curved.cells.log(variable)
  ends = [curved.value(slope) + curved.value("q") * (x - logs.mean())
          for x in (logs.min(), logs.max())]
  verdict = "is not constant" if p_value < 0.05 else "is not shown to vary"
  return (f"the slope along ln {variable} {verdict} (p = {p_value:.2g}): {ends[0]:+.3g} at "
          f"{np.exp(logs.min()):.3g}, {ends[1]:+.3g} at {np.exp(logs.max()):.3g}, on average "
          f"{np.mean(ends):+.3g}")


def _claim_lines(cells: Cells, margin: float, seed: int) -> list[str]:
  lines = []
  for claim in claims.assess(cells, margin, seed):
    lines.append(f"{claim.name} ({claim.parameter} > 0): {claim.verdict}")
    if claim.interval is not None:
      lines += [f"  {claim.interval}",
                f"  equivalence: 90 % interval [{claim.equivalence.low:+.4g}, "
                f"{claim.equivalence.high:+.4g}] against the margin of {margin:g}"]
    lines.append(f"  {claim.sentence}")
  try:
    found = claims.mechanism(cells, seed).sentences
  except FieldError as error:
    found = (str(error),)
  return lines + ["mechanism"] + ["  " + sentence for sentence in found]
