"""Reports learning rates from sweeps, as lines of text and as the file that a grid reads."""

import hashlib
import math
import statistics
from collections.abc import Sequence

from moe_jax.errors import FieldError, require
from moe_jax.study import rates
from moe_jax.text import aligned


def optima_of(sweeps: Sequence[rates.Sweep], seed_sd: float, source: str) -> list[rates.Optimum]:
  """Returns the optimum of each sweep. Raises FieldError naming every sweep to extend."""
  optima, refused = [], []
  for sweep in sweeps:
    try:
      one = rates.optimum(sweep, seed_sd)
      rates.require_bounded(one, seed_sd)  # the law weights all optima equally
      optima.append(one)
    except FieldError as error:
      refused.append(f"{error.value} {error.accepted}")
  require(not refused, "results", source, "; ".join(refused))
  return optima


def report(found: rates.RateFit, seed_sd: float) -> list[str]:
  """Returns a table of optima next to the law's rates, and the law itself."""
  rows = [("sweep", "N_total", "s", "n_exp", "rates", "optimum", "95 % interval", "by the law")]
  for one in found.optima:
    known = one.sweep.variables
    rows.append((one.sweep.cell, f"{known['n_total']:.0f}", f"{known['sparsity']:g}",
                 f"{known['n_exp']:g}", str(len(one.sweep.rates)), f"{one.rate:.3g}",
                 _interval(one), f"{found.fitted(one):.3g}"))
  lines = [f"noise between seeds {100 * seed_sd:.2g} % of the loss", *aligned(rows)]
  for name in rates.VARIABLES:
    lines.append(f"d ln lr* / d ln {name}: {found.rates.coefficients[name]:+.3f} ± "
                 f"{found.errors[name]:.3f} (standard error)")
  return [*lines, f"every optimum is within a factor of {found.worst_factor:.3g} of the law"]


def _interval(one: rates.Optimum) -> str:
  return f"{one.low:.3g} to {one.high:.3g}" if math.isfinite(one.high) else "not bounded"


def check(sweeps: Sequence[rates.Sweep], law: rates.Rates, seed_sd: float) -> list[str]:
  """Reports how far the law's rate is from each sweep's optimum, and the loss that costs."""
  rows, costs, outside = [("sweep", "by the law", "optimum", "95 % interval", "excess loss")
                          ], [], 0
  for sweep in sweeps:
    rate = law.at(**sweep.variables)
    try:
      one = rates.optimum(sweep, seed_sd)
    except FieldError as error:
      outside += 1
      rows.append((sweep.cell, f"{rate:.3g}", error.accepted, "", ""))
      continue
    costs.append(one.loss_above(rate))
    rows.append((sweep.cell, f"{rate:.3g}", f"{one.rate:.3g}", _interval(one),
                 f"{100 * costs[-1]:.2g} %"))
  lines = aligned(rows)
  if costs:
    lines.append(f"loss above the optimum: median {100 * statistics.median(costs):.2g} %, maximum "
                 f"{100 * max(costs):.2g} %, {len(costs)} sweeps")
  return lines + ([f"{outside} of {len(sweeps)} have no optimum within their rates: the law is "
                   "off by more than half a step there, or noise between seeds hides the "
                   "optimum"] if outside else [])


def as_dict(found: rates.RateFit, table: bytes) -> dict:
  """Returns the contents of the file; runs are named by their identity hash."""
  return {
      "results_sha256": hashlib.sha256(table).hexdigest(),
      "coefficients": dict(found.rates.coefficients),
      "standard_errors": {name: None if math.isnan(value) else value
                          for name, value in found.errors.items()},
      "optima": [{
          "cell": one.sweep.cell, **one.sweep.variables, "rate": one.rate,
          "interval": [one.low, one.high],
          "by_the_law": found.fitted(one), "runs": list(one.sweep.identities)}
                 for one in found.optima]}
