"""Tests the claims of arXiv 2601.08215 on one's own grid.

Each claim is about one coefficient of ln L = c0 - a ln N_total + (b - c) ln n_exp + c ln s:
"sparsity hurts" means c > 0; "more experts hurt at equal N_total and s" means b - c > 0. Each
gets a two-sided interval and an equivalence test (TOST, two one-sided tests at 5 %: whether the
90 % interval lies within the margin), because failing to see an effect does not show that there
is none.
"""

import dataclasses

import numpy as np

from moe_jax.errors import FieldError
from moe_jax.laws.cells import Cells
from moe_jax.laws.fit import Fit, fit
from moe_jax.laws.intervals import DRAWS, Interval, bootstrap
from moe_jax.laws.power import MARGIN, Margin
from moe_jax.laws.table import NOT_ROUTED

SHOWN, OPPOSITE, EQUIVALENT, UNDECIDED, REFUSED = (
    "shown", "the opposite is shown", "equivalent to none", "undecided", "not identified")


@dataclasses.dataclass(frozen=True)
class Claim:
  """A claim tested against the data.

  Attributes:
    name: the claim in a few words.
    parameter: the coefficient that the claim says is positive.
    verdict: SHOWN, OPPOSITE, EQUIVALENT, UNDECIDED or REFUSED.
    interval: the two-sided 95 % interval; None if refused.
    equivalence: the 90 % interval of the two one-sided tests; None if refused.
    margin: the equivalence margin; smaller effects count as none.
    sentence: what these data show and cannot show.
  """

  name: str
  parameter: str
  verdict: str
  interval: Interval | None
  equivalence: Interval | None
  margin: Margin
  sentence: str


_CLAIMS = (
    ("sparsity hurts", "c", "sparsity", "n_total and n_exp",
     "c is the slope at these training tokens; in published tables it grows with tokens."),
    ("more experts hurt", "b_minus_c", "n_exp", "n_total and sparsity",
     "This does not explain why: see the mechanism."),
)


def assess(cells: Cells, margin: Margin = MARGIN, seed: int = 0,
           law: str = "paper", draws: int = DRAWS) -> list[Claim]:
  """Tests both claims on `law`, a log-log form in n_total, sparsity and n_exp alone."""
  try:
    fitted = fit(cells, law)
  except FieldError as error:
    return [Claim(name, parameter, REFUSED, None, None, margin,
                  f"These data cannot say whether {name}: {error}.")
            for name, parameter, *_ in _CLAIMS]
  wide, narrow = (bootstrap(fitted, level, draws, seed) for level in (0.95, 0.90))
  found = [_claim(fitted, wide, narrow, margin, *claim) for claim in _CLAIMS]
  if "q" in wide:
    found[0] = dataclasses.replace(found[0], sentence=found[0].sentence + " With curvature, c is "
                                   "the slope at the grid's mean ln s.")
  return found


def _claim(fitted: Fit, wide: dict[str, Interval], narrow: dict[str, Interval], margin: Margin,
           name: str, parameter: str, variable: str, held: str, cannot: str) -> Claim:
  if parameter not in wide:
    why = fitted.identified.refused[parameter]
    instead = "; ".join(f"{what} = {wide[p]}" for p, what in
                        fitted.identified.combinations.items())
    return Claim(name, parameter, REFUSED, None, None, margin,
                 f"These data cannot say whether {name}: {why}."
                 + (f" Identified instead: {instead}." if instead else ""))
  interval, tost = wide[parameter], narrow[parameter]
  negligible = -margin.slope < tost.low and tost.high < margin.slope
  verdict = (SHOWN if interval.low > 0 else OPPOSITE if interval.high < 0 else
             EQUIVALENT if negligible else UNDECIDED)
  percent = 100 * (2**interval.estimate - 1)
  ends = [100 * (2**end - 1) for end in (interval.low, interval.high)]
  effect = (f"at equal {held}, doubling {variable} changes the loss by {percent:+.2f} % "
            f"[{ends[0]:+.2f}, {ends[1]:+.2f}]")
  meaning = {
      SHOWN: f"These data show it: {effect}.",
      OPPOSITE: f"These data show the opposite: {effect}.",
      EQUIVALENT: f"These data show that there is no effect beyond the margin of {margin}: "
                  f"{effect}.",
      UNDECIDED: f"These data do not decide it, which does not mean that there is no effect: "
                 f"{effect}.",
  }[verdict]
  if negligible and verdict in (SHOWN, OPPOSITE):
    meaning += f" It is smaller than the margin of {margin}."
  return Claim(name, parameter, verdict, interval, tost, margin, f"{meaning} {cannot}")


@dataclasses.dataclass(frozen=True)
class Mechanism:
  """Which explanations of "more experts hurt" the grid can separate.

  Attributes:
    core_or_active: whether it can separate fewer core dimensions from fewer active parameters.
    experts_or_core: whether it can separate more experts from fewer core dimensions.
    estimates: slope -> interval, for the explanations that can be separated.
    sentences: what these data show and cannot show.
  """

  core_or_active: bool
  experts_or_core: bool
  estimates: dict[str, Interval]
  sentences: tuple[str, ...]


def mechanism(cells: Cells, seed: int = 0, draws: int = DRAWS) -> Mechanism:
  """Checks which explanations the grid can separate, and estimates slopes only for those.

  N_active = 4 l d² (1 - 1/s) + N_total / s, counting the router in the core's 4 l d²: at fixed
  N_total and s, the core determines the active parameters, unless attention's share of d²
  differs between cells. N_total = l d² (4 + 3 n_exp / g): at fixed N_total, n_exp determines
  the core, unless granularity g varies independently of n_exp.

  Raises:
    FieldError: the data lack n_layers, d_model or d_expert.
  """
  for column in ("n_active", "n_total", "n_exp", "granularity", "core"):
    if column not in cells.columns:
      raise FieldError("column", column, "is needed for the mechanism; these data lack it")
  share, spread = _attention_share(cells), _granularity_apart(cells)
  more = [name for name in NOT_ROUTED
          if len({str(row.get(name)) for runs in cells.runs for row in runs}) > 1]
  core_or_active = share[1] > 1.1 * share[0] and not more
  experts_or_core = spread > 0.05
  sentences = [
      f"Cells differ in {', '.join(more)}, so the attention share is unknown, and fewer core "
      "dimensions cannot be separated from fewer active parameters." if more else
      f"Attention has {share[0]:.3g} to {share[1]:.3g} d² parameters per layer: "
      + ("this varies, so fewer core dimensions and fewer active parameters can be separated."
         if core_or_active else
         "at fixed n_total and s, fewer core dimensions and fewer active parameters are "
         "confounded in these data. Cells with another attention share (grouped queries, another "
         "head width) would separate them."),
      "Granularity " + (
          "varies independently of n_exp, so more experts and fewer core dimensions can be "
          "separated." if experts_or_core else
          "does not vary independently of n_exp, so more experts and fewer core dimensions are "
          "confounded in these data. Cells with n_exp / granularity held fixed would separate "
          "them.")]
  estimates: dict[str, Interval] = {}
  for broken, law in ((experts_or_core, "experts-or-core"), (core_or_active, "core-or-active")):
    if broken:
      sentences += _estimate(cells, law, seed, draws, estimates)
  return Mechanism(core_or_active, experts_or_core, estimates, tuple(sentences))


def _attention_share(cells: Cells) -> tuple[float, float]:
  """Returns (min, max) over MoE cells of (core parameters without the router) / (l d²)."""
  x = cells.columns
  moe = x["sparsity"] > 1.01
  if not moe.any():
    return 4.0, 4.0
  s = x["sparsity"][moe]
  core = (x["n_active"][moe] - x["n_total"][moe] / s) / (1 - 1 / s)
  share = core / x["core"][moe] - x["n_exp"][moe] / x["d_model"][moe]
  return float(share.min()), float(share.max())


def _granularity_apart(cells: Cells) -> float:
  """Residual standard deviation of ln g regressed on a quadratic in ln n_exp and ln n_total."""
  e, n, g = (cells.log(name) for name in ("n_exp", "n_total", "granularity"))
  e, n = e - e.mean(), n - n.mean()
  x_NP = np.stack([np.ones_like(e), e, e**2, n, n**2, e * n], axis=1)
  rank = np.linalg.matrix_rank(x_NP)
  left = g - x_NP @ np.linalg.lstsq(x_NP, g, rcond=None)[0]
  return float(np.sqrt(left @ left / max(1, len(g) - rank)))


def _estimate(cells: Cells, law: str, seed: int, draws: int,
              estimates: dict[str, Interval]) -> list[str]:
  try:
    fitted = fit(cells, law)
  except FieldError as error:
    return [f"Their slopes cannot be estimated: {error.accepted}."]
  sentences = []
  intervals = bootstrap(fitted, draws=draws, seed=seed)
  for parameter, reading in (("more_experts", "more experts at equal core"),
                             ("core", "a larger core"), ("active", "more active parameters")):
    if parameter in intervals:
      found = estimates[f"{law}: {parameter}"] = intervals[parameter]
      effect = ("it lowers the loss" if found.high < 0 else "it raises the loss" if found.low > 0
                else "it is not significant")
      sentences.append(f"By {law}, the effect of {reading} is {found}: {effect}.")
    elif parameter in fitted.identified.refused:
      sentences.append(f"By {law}, the effect of {reading} is not identified: "
                       f"{fitted.identified.refused[parameter]}.")
  return sentences
