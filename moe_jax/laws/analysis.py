"""All that a report says, computed once: the text and the page show the same numbers."""

import dataclasses
import functools

import numpy as np

from moe_jax.errors import FieldError
from moe_jax.laws import claims, intervals, validate
from moe_jax.laws.cells import Cells
from moe_jax.laws.claims import Claim, Mechanism
from moe_jax.laws.fit import Fit, fit
from moe_jax.laws.intervals import Interval
from moe_jax.laws.power import MARGIN, Margin
from moe_jax.laws.validate import LeftOut, NestedTest, Rival

# The rivals of a log-log form, and the pairs of which one contains the other.
RIVALS = ("paper", "paper-curved", "total-sparsity", "total-active")
NESTED = (("total-sparsity", "paper"), ("paper", "paper-curved"))
HELD_OUT = ("n_total", "sparsity")
# Forms of n_total, sparsity and n_exp alone: with another variable beside them c and b_minus_c
# are slopes at given values of that one too, and the claims are not about those.
OF_THE_CLAIMS = ("paper", "paper-curved")


@dataclasses.dataclass(frozen=True)
class Nested:
  """An F-test of `large` against `small`, or why there is none."""

  small: str
  large: str
  test: NestedTest | None
  bent: Fit | None  # the large form where it has curvature in ln s
  refusal: str = ""


@dataclasses.dataclass(frozen=True)
class Analysis:
  """A fit and what is to be thought of it.

  Attributes:
    fitted: the fit, with its design report.
    margin: effects below it count as none.
    headline: by the bootstrap whose coverage is right: the interval that is quoted.
    pairs: of a log-log form, if errors are common to all sizes of a pair (n_exp, s).
    profile: by profile likelihood, cells taken as independent.
    huber: of the Huber solver, by rescaled subsamples.
    architectures: refits without one architecture.
    n_exps: refits without one n_exp.
    held_out: refits without the largest value of a variable: extrapolation.
    rivals: of a log-log form; empty otherwise, as are the three that follow.
    nested: F-tests.
    claims_law: the form whose slopes the claims are about; empty where there are no claims.
    claims: the paper's claims.
    mechanism: what of the mechanism these data can tell, or why nothing.
  """

  fitted: Fit
  margin: Margin
  headline: dict[str, Interval]
  pairs: dict[str, Interval]
  profile: dict[str, Interval]
  huber: dict[str, Interval]
  architectures: list[LeftOut]
  n_exps: list[LeftOut]
  held_out: list[LeftOut]
  rivals: list[Rival]
  nested: list[Nested]
  claims_law: str
  claims: list[Claim]
  mechanism: Mechanism | str

  @property
  def cells(self) -> Cells:
    return self.fitted.cells

  @functools.cached_property
  def unbounded(self) -> set[str]:
    """Parameters that are refused as the data do not bound them."""
    return {name for name, found in self.profile.items()
            if not np.isfinite([found.low, found.high]).all()}

  @functools.cached_property
  def disagreeing(self) -> set[str]:
    """Parameters on which the two solvers' intervals have nothing in common."""
    return {name for name in self.fitted.parameters if name not in self.unbounded
            and (self.headline[name].low > self.huber[name].high
                 or self.huber[name].low > self.headline[name].high)}


def analyse(cells: Cells, law: str, margin: Margin = MARGIN, draws: int = intervals.DRAWS,
            seed: int = 0) -> Analysis:
  """Fits, and looks at the fit from all sides. The same input gives the same output.

  Raises:
    FieldError: the law is unknown or cannot be fitted to these cells.
  """
  fitted = fit(cells, law, seed=seed)
  asked = fitted.identified.asked
  log_log = asked.is_linear
  claims_law = ("" if not log_log else asked.name if asked.name in OF_THE_CLAIMS else
                "paper-curved")
  x = cells.columns
  return Analysis(
      fitted, margin,
      headline=intervals.bootstrap(fitted, draws=draws, seed=seed),
      pairs=intervals.by_pair(fitted, draws, seed),
      profile=intervals.profile(fitted),
      huber=intervals.subsample(fitted, draws=min(intervals.SUBSAMPLES, draws), seed=seed,
                                solver="huber"),
      architectures=validate.leave_one_architecture_out(fitted),
      n_exps=validate.leave_one_value_out(fitted, "n_exp") if "n_exp" in x else [],
      held_out=[validate.extrapolate(fitted, column) for column in HELD_OUT if column in x],
      rivals=validate.compare(cells, list(RIVALS)) if log_log else [],
      nested=[_nested(cells, *pair) for pair in NESTED] if log_log else [],
      claims_law=claims_law,
      claims=claims.assess(cells, margin, seed, claims_law, draws) if log_log else [],
      mechanism=_mechanism(cells, seed, draws) if log_log else "")


def _mechanism(cells: Cells, seed: int, draws: int) -> Mechanism | str:
  try:
    return claims.mechanism(cells, seed, draws)
  except FieldError as error:
    return str(error)


def _nested(cells: Cells, small: str, large: str) -> Nested:
  try:
    big = fit(cells, large)
    test = validate.f_test(fit(cells, small), big)
  except FieldError as error:
    return Nested(small, large, None, None, error.accepted)
  return Nested(small, large, test, big if {"c", "q"} <= set(big.parameters) else None)
