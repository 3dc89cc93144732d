"""Power analysis: the smallest effect a grid can detect, and the margin it can show equivalence to.

Both tests are those of moe_jax.laws.claims: a two-sided 95 % interval that excludes 0, and a
90 % interval within ± the margin. Both use Student's t with the standard error estimated from the
residuals. Power is the normal probability given the estimated error, averaged over the
distribution of that estimate. Where cells share architectures, the wild bootstrap on a dozen of
them has somewhat less power: about 72 % where 80 % is stated (tests/laws/power_test.py).
"""

import dataclasses
import functools

import numpy as np

from moe_jax.errors import require
from moe_jax.laws.information import Design, Noise

LEVEL = 0.95
POWER = 0.80
_QUANTILES = (np.arange(1000) + 0.5) / 1000


@dataclasses.dataclass(frozen=True)
class Margin:
  """Equivalence margin; defaults to the one planned in experiments/study.

  Attributes:
    percent: change of the loss, in percent and in either direction, that counts as none
    fold: when a variable grows by this factor.
  """

  percent: float = 0.25
  fold: float = 8.0

  def __post_init__(self):
    require(1 < self.fold < np.inf, "fold", self.fold, "must be a finite number above 1")
    require(0 < self.percent < 100, "margin_percent", self.percent,
            "must be above 0 and below 100")

  @property
  def slope(self) -> float:
    """The margin in units of a coefficient: d ln L / d ln x."""
    return slope_of(self.percent, self.fold)

  def __str__(self) -> str:
    return f"{self.percent:g} % of the loss when a variable grows {self.fold:g}-fold"


@dataclasses.dataclass(frozen=True)
class Power:
  """Power of a design for one coefficient, in units of the coefficient.

  Attributes:
    parameter: the coefficient's name.
    df: degrees of freedom of its interval.
    half_width: expected half-width of its 95 % interval.
    detectable: smallest true value detected with 80 % power (its interval excludes 0).
    margin: smallest equivalence margin shown with 80 % power if the true value is 0.
    at_margin: power to show equivalence at the requested margin if the true value is 0.
  """

  parameter: str
  df: float
  half_width: float
  detectable: float
  margin: float
  at_margin: float


MARGIN = Margin()


def power_of(design: Design, noise: Noise, margin: float) -> list[Power]:
  """Returns the power for each coefficient.

  Args:
    design: a design with linearly independent columns.
    noise: the noise of the losses.
    margin: margin of the equivalence test, in units of the coefficient.

  Raises:
    FieldError: the margin is not positive.
  """
  require(margin > 0, "margin", margin, "must be above 0")
  found = []
  for p, (name, error) in enumerate(design.standard_errors(noise).items()):
    df = design.degrees_of_freedom(noise, np.eye(len(design.parameters))[p])
    found.append(Power(name, df, error * t_quantile(df), error * detectable(df),
                       error * equivalence_margin(df), equivalence_power(margin / error, df)))
  return found


@functools.cache
def t_quantile(df: float, level: float = LEVEL) -> float:
  """Returns Student's t quantile for a two-sided interval at this level."""
  from scipy import stats
  return float(stats.t.ppf((1 + level) / 2, df))


@functools.cache
def _estimated_error(df: float) -> np.ndarray:
  """Returns quantiles of the ratio of the estimated standard error to the true one."""
  from scipy import stats
  return np.sqrt(stats.chi2.ppf(_QUANTILES, df) / df)


def detection_power(effect: float, df: float) -> float:
  """Probability that a two-sided 95 % interval excludes 0; `effect` in standard errors."""
  from scipy import stats
  needed = t_quantile(df) * _estimated_error(df)
  return float(np.mean(stats.norm.cdf(effect - needed) + stats.norm.cdf(-effect - needed)))


@functools.cache
def detectable(df: float) -> float:
  """Smallest effect, in standard errors, that is detected with power POWER."""
  import scipy.optimize
  return float(scipy.optimize.brentq(lambda effect: detection_power(effect, df) - POWER,
                                     0, 3 * t_quantile(df)))


def equivalence_power(margin: float, df: float, effect: float = 0.0) -> float:
  """Probability that a 90 % interval lies within ± margin; both in standard errors."""
  from scipy import stats
  room = margin - t_quantile(df, 0.90) * _estimated_error(df)
  inside = stats.norm.cdf(room - effect) - stats.norm.cdf(-room - effect)
  return float(np.mean(np.maximum(0, inside)))


@functools.cache
def equivalence_margin(df: float) -> float:
  """Smallest margin, in standard errors, shown with power POWER if there is no effect."""
  import scipy.optimize
  return float(scipy.optimize.brentq(lambda margin: equivalence_power(margin, df) - POWER,
                                     0, 6 * t_quantile(df, 0.90)))


def percent_over(slope: float, fold: float) -> float:
  """Returns the change of the loss, in percent, when a variable grows `fold`-fold."""
  return 100 * float(np.expm1(slope * np.log(fold)))


def slope_of(percent: float, fold: float) -> float:
  """The inverse of `percent_over`."""
  return float(np.log1p(percent / 100) / np.log(fold))
