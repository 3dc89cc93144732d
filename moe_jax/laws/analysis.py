"""Computes everything a report shows, once, so that the text and the page agree."""

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

# The rivals of a log-log form, and the (small, large) pairs that are nested.
RIVALS = ("paper", "paper-curved", "total-sparsity", "total-active")
NESTED = (("total-sparsity", "paper"), ("paper", "paper-curved"))
HELD_OUT = ("n_total", "sparsity")
# Forms in n_total, sparsity and n_exp alone. With a further variable, c and b_minus_c would be
# slopes with that variable held fixed too, which is not what the claims are about.
OF_THE_CLAIMS = ("paper", "paper-curved")


@dataclasses.dataclass(frozen=True)
class Nested:
  """An F-test of `large` against `small`, or the reason there is none."""

  small: str
  large: str
  test: NestedTest | None
  bent: Fit | None  # the fit of the large form, if it has curvature in ln s
  refusal: str = ""


@dataclasses.dataclass(frozen=True)
class Analysis:
  """A fit with its intervals, checks, rival forms and tests of the paper's claims.

  Attributes:
    fitted: the fit, with its design report.
    margin: the equivalence margin; smaller effects count as none.
    headline: bootstrap intervals, the ones to quote: their coverage is right.
    pairs: intervals of a log-log form if all sizes of a pair (n_exp, s) share their error.
    profile: profile-likelihood intervals, which treat cells as independent.
    huber: intervals of the Huber solver, from rescaled subsamples.
    architectures: refits that leave out one architecture each.
    n_exps: refits that leave out one value of n_exp each.
    held_out: refits without the largest value of a variable, to test extrapolation.
    rivals: the rivals of a log-log form; empty for other forms, as are the next four fields.
    nested: F-tests of nested forms.
    claims_law: the form whose slopes the claims are about; empty if no claims are tested.
    claims: the paper's claims, tested.
    mechanism: which explanations these data can separate, or why none.
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
    """Parameters that are refused because the data do not bound them."""
    return {name for name, found in self.profile.items()
            if not np.isfinite([found.low, found.high]).all()}

  @functools.cached_property
  def disagreeing(self) -> set[str]:
    """Parameters for which the two solvers' intervals do not overlap."""
    return {name for name in self.fitted.parameters if name not in self.unbounded
            and (self.headline[name].low > self.huber[name].high
                 or self.huber[name].low > self.headline[name].high)}


def analyse(cells: Cells, law: str, margin: Margin = MARGIN, draws: int = intervals.DRAWS,
            seed: int = 0) -> Analysis:
  """Fits a law, then computes its intervals, checks and tests. Deterministic given `seed`.

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
