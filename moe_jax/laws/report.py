"""Formats an analysis as lines of text."""

import numpy as np

from moe_jax.errors import FieldError
from moe_jax.laws import validate
from moe_jax.laws.analysis import Analysis, Nested
from moe_jax.laws.fit import Fit
from moe_jax.laws.validate import LeftOut, Rival


def report(found: Analysis) -> list[str]:
  """Returns the whole report: data, design, fit, trust; rivals and claims for log-log forms."""
  lines = [*_titled("data", found.cells.notes), *found.fitted.identified.lines()]
  lines += _titled("fit by two solvers on residuals of ln L; quote the first interval",
                   fit_lines(found))
  lines += _titled("trust", trust_lines(found))
  if found.rivals:
    lines += _titled("rival forms", rival_lines(found))
    lines += _titled(f"claims of arXiv 2601.08215 by {found.claims_law}, margin {found.margin}",
                     _claim_lines(found))
  return lines


def _titled(title: str, lines) -> list[str]:
  return [title] + ["  " + line for line in lines]


def fit_lines(found: Analysis) -> list[str]:
  """Returns the estimates of both solvers, and how well they fit."""
  lines = []
  for name in found.fitted.parameters:
    profile = found.profile[name]
    if name in found.unbounded:
      lines.append(f"{name:16s} REFUSED: these data do not bound it: 95 % profile likelihood "
                   f"from {profile.low:+.4g} to {profile.high:+.4g}")
      continue
    lines.append(f"{name:16s} {found.headline[name]}")
    lines += [f"{'':16s} {other}" for other in (profile, found.huber[name])]
    if name in found.disagreeing:
      lines.append(f"{'':16s} the solvers disagree: outliers, or a form that does not fit")
  return lines + quality_lines(found.fitted)


def quality_lines(fitted: Fit) -> list[str]:
  """Returns the objectives of both solvers, and warnings about interpreting the residuals."""
  lines = [f"{s.solver}: rmse {100 * s.rmse:.3g} % of the loss, mean Huber (delta 1e-3) "
           f"{s.objective:.4g}; {s.agreeing} of {s.starts} starts agree"
           for s in (fitted.least_squares, fitted.huber)]
  lines += fitted.doubts
  if fitted.cells.n_architectures < len(fitted.cells):
    lines.append("several cells share an architecture: the profile likelihood treats them as "
                 "independent, so its intervals for shape coefficients are too short (if errors "
                 "are shared within an architecture, 95 % intervals cover the truth about 80 % "
                 "of the time in simulated grids); quote the bootstrap, which resamples "
                 "architectures")
  se = fitted.cells.loss_se / fitted.cells.loss
  seeds = np.nanmean(se) if np.isfinite(se).any() else np.nan
  if seeds > 0:
    ratio = fitted.scatter / seeds  # not the rmse: a fit uses up P degrees of freedom
    lines.append(f"residuals are {ratio:.2g} times the noise between seeds"
                 + (": the form misses a real effect" if ratio > 2 else ""))
  return lines


def trust_lines(found: Analysis) -> list[str]:
  """Returns how the fit changes when some of its cells are left out."""
  fitted, lines = found.fitted, [
      f"if errors are shared by all sizes of a pair (n_exp, s): {name} {found.pairs[name]}"
      for name in ("c", "b_minus_c") if name in found.pairs]
  for title, parts in (("one architecture", found.architectures), ("one n_exp", found.n_exps)):
    good = [part for part in parts if part.theta is not None]
    lines += [part.refusal for part in parts if part.theta is None]
    if good:
      error = np.concatenate([part.error for part in good])
      lines.append(f"leaving {title} out: prediction rmse "
                   f"{100 * np.sqrt(np.mean(error**2)):.3g} % of the loss")
      lines += [_range_line(fitted, p, good) for p in range(len(fitted.parameters))]
  return lines + [extrapolation_line(part, fitted) for part in found.held_out]


def _range_line(fitted: Fit, p: int, parts: list[LeftOut]) -> str:
  values = np.array([part.theta[p] for part in parts])
  far = parts[int(np.argmax(np.abs(values - fitted.least_squares.theta[p])))].what
  return (f"  {fitted.parameters[p]:14s} {values.min():+.4g} to {values.max():+.4g}, changed "
          f"most by leaving out {far}")


def extrapolation_line(part: LeftOut, fitted: Fit) -> str:
  """Returns how well the held-out cells are predicted."""
  if part.error is None:
    return f"no extrapolation: {part.refusal}"
  mean, rmse = np.mean(part.error), np.sqrt(np.mean(part.error**2))
  return (f"extrapolation to {part.what} ({len(part.error)} cells held out): mean error "
          f"{100 * mean:+.3g} % of the loss, median absolute error "
          f"{100 * np.median(np.abs(part.error)):.3g} %, rmse {100 * rmse:.3g} % (fitted "
          f"cells {100 * fitted.least_squares.rmse:.3g} %)")


def rival_lines(found: Analysis) -> list[str]:
  """Compares rival forms by information criteria, cross-validation and F-tests."""
  lines = [_rival_line(rival) for rival in found.rivals]
  lines += [_cv_line(found.rivals[0], other) for other in found.rivals[1:]]
  if found.cells.n_architectures < len(found.cells):
    lines.append("the F-tests below treat cells as independent, but several share an "
                 "architecture: their p-values are too small")
  return lines + [line for nested in found.nested for line in nested_lines(nested)]


def _rival_line(rival: Rival) -> str:
  if rival.refusal:
    return f"{rival.law:15s} {rival.refusal}"
  without = [f"{100 * rmse:.3g} % without one {what}" if np.isfinite(rmse) else
             f"not available without one {what}: some refits do not identify the form"
             for what, rmse in (("architecture", rival.cv_rmse), ("n_exp", rival.n_exp_rmse))]
  return (f"{rival.law:15s} {rival.n_parameters} parameters, rmse {100 * rival.rmse:.3g} %, "
          f"AICc {rival.aicc:.1f}, BIC {rival.bic:.1f}, cross-validated rmse "
          + ", ".join(without))


def _cv_line(one: Rival, other: Rival) -> str:
  title = f"cross-validation of {one.law} against {other.law}: "
  try:
    mean, error = validate.cv_difference(one, other)
  except FieldError as refused:
    return f"{title}not available: {refused}"
  if abs(mean) <= 2 * error:
    return title + "no significant difference"
  better = one.law if mean < 0 else other.law
  return f"{title}{better} predicts better ({abs(mean) / error:.1f} standard errors)"


def nested_lines(nested: Nested) -> list[str]:
  """Returns an F-test and, if it tests curvature, the slope at either end."""
  title = f"F-test of {nested.large} against {nested.small}: "
  if nested.test is None:
    return [f"{title}not available: {nested.refusal}"]
  test = nested.test
  lines = [f"{title}F {test.f:.3g} on {test.df[0]} and {test.df[1]}, p = {test.p_value:.2g}"]
  return lines + ([slope_line(nested.bent, test.p_value)] if nested.bent else [])


def slope_line(curved: Fit, p_value: float, slope: str = "c", variable: str = "sparsity") -> str:
  """Reports whether the slope along ln(variable) is constant, from a form with curvature q."""
  logs = curved.cells.log(variable)
  ends = [curved.value(slope) + curved.value("q") * (x - logs.mean())
          for x in (logs.min(), logs.max())]
  verdict = "is not constant" if p_value < 0.05 else "does not vary significantly"
  return (f"the slope along ln {variable} {verdict} (p = {p_value:.2g}): {ends[0]:+.3g} at "
          f"{np.exp(logs.min()):.3g}, {ends[1]:+.3g} at {np.exp(logs.max()):.3g}, on average "
          f"{np.mean(ends):+.3g}")


def _claim_lines(found: Analysis) -> list[str]:
  lines = []
  for claim in found.claims:
    lines.append(f"{claim.name} ({claim.parameter} > 0): {claim.verdict}")
    if claim.interval is not None:
      lines += [f"  {claim.interval}",
                f"  equivalence: 90 % interval [{claim.equivalence.low:+.4g}, "
                f"{claim.equivalence.high:+.4g}], margin ±{found.margin.slope:.3g} "
                f"({found.margin})"]
    lines.append(f"  {claim.sentence}")
  sentences = ((found.mechanism,) if isinstance(found.mechanism, str)
               else found.mechanism.sentences)
  return lines + ["mechanism"] + ["  " + sentence for sentence in sentences]
