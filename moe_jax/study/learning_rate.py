"""The best learning rate of each sweep, and a law lr*(N_total, s, n_exp) through them.

    python -m moe_jax.study.learning_rate --results=runs/study-pilots/results.csv \\
        --write=experiments/study/rates.json
    python -m moe_jax.study.learning_rate --results=runs/study-rate-check/results.csv \\
        --check=experiments/study/rates.json

A sweep whose best rate is at its edge is refused with the rates to add. --check holds a law
that was fitted before against sweeps at other cells.
"""

import hashlib
import math
import statistics

from absl import flags
from etils import epath

from moe_jax import cli
from moe_jax.errors import FieldError, require
from moe_jax.laws.table import read_results
from moe_jax.run_dir import write_json
from moe_jax.study import rates
from moe_jax.study.noise import SEED_SD
from moe_jax.text import aligned

_RESULTS = flags.DEFINE_string("results", None, "results.csv of the sweeps.", required=True)
_WHERE = flags.DEFINE_multi_string("where", [], "COLUMN=VALUE: keep these rows alone.")
_WITHOUT = flags.DEFINE_list("without", [], "Cells to leave out, by name.")
_SEED_SD = flags.DEFINE_float("seed_sd", SEED_SD, "Standard deviation of ln L between seeds.")
_WRITE = flags.DEFINE_string("write", None, "Write the law as this .json file.")
_CHECK = flags.DEFINE_string("check", None, "Fit nothing; hold this law, a file of --write, "
                             "against the sweeps.")


def main(overrides: list[str]) -> None:
  if overrides:
    field, _, value = overrides[0].removeprefix("--").partition("=")
    raise FieldError(field, value, "is not a flag of this command")
  require(0 < _SEED_SD.value < 1, "seed_sd", _SEED_SD.value, "must be above 0 and below 1")
  require(_WRITE.value is None or _WRITE.value.endswith(".json"), "write", _WRITE.value,
          "must end in .json")
  require(_WRITE.value is None or _CHECK.value is None, "write", _WRITE.value,
          "writes nothing with --check")
  law = None if _CHECK.value is None else rates.read(_CHECK.value)
  sweeps = rates.sweeps_of(read_results(_RESULTS.value, _WHERE.value, _WITHOUT.value),
                           _RESULTS.value)
  if law is not None:
    print("\n".join(check(sweeps, law, _SEED_SD.value)))
    return
  found = rates.fit_rates(optima_of(sweeps, _SEED_SD.value), _RESULTS.value)
  print("\n".join(report(found, _SEED_SD.value)))
  if _WRITE.value is not None:
    write_json(epath.Path(_WRITE.value), as_dict(found, epath.Path(_RESULTS.value).read_bytes()))
    print(f"written: {_WRITE.value}")


def optima_of(sweeps: list[rates.Sweep], seed_sd: float) -> list[rates.Optimum]:
  """Of all sweeps. Raises FieldError that names every sweep that is to be widened."""
  optima, refused = [], []
  for sweep in sweeps:
    try:
      optima.append(rates.optimum(sweep, seed_sd))
    except FieldError as error:
      refused.append(f"{error.value} {error.accepted}")
  require(not refused, "results", _RESULTS.value, "; ".join(refused))
  return optima


def report(found: rates.RateFit, seed_sd: float) -> list[str]:
  """The optima beside the law's rates, and the law."""
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
  return [*lines, f"no optimum is further from the law than a factor of "
          f"{found.worst_factor:.3g}"]


def _interval(one: rates.Optimum) -> str:
  return f"{one.low:.3g} to {one.high:.3g}" if math.isfinite(one.high) else "not bounded"


def check(sweeps: list[rates.Sweep], law: rates.Rates, seed_sd: float) -> list[str]:
  """How far the law's rate is from each sweep's optimum, and what that costs."""
  rows, costs, outside = [("sweep", "by the law", "optimum", "95 % interval", "loss above it")
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
    lines.append(f"loss above the optimum: {100 * statistics.median(costs):.2g} % in the middle, "
                 f"{100 * max(costs):.2g} % at most, of {len(costs)} sweeps")
  return lines + ([f"{outside} of {len(sweeps)} have no optimum among their rates: the law is "
                   "off by more than the sweep's width there"] if outside else [])


def as_dict(found: rates.RateFit, table: bytes) -> dict:
  """What the file holds; the runs are named by their identity's hash."""
  return {
      "results_sha256": hashlib.sha256(table).hexdigest(),
      "coefficients": dict(found.rates.coefficients),
      "standard_errors": {name: None if math.isnan(value) else value
                          for name, value in found.errors.items()},
      "optima": [{
          "cell": one.sweep.cell, **one.sweep.variables, "rate": one.rate,
          "interval": [one.low, one.high] if math.isfinite(one.high) else None,
          "by_the_law": found.fitted(one), "runs": list(one.sweep.identities)}
                 for one in found.optima]}


if __name__ == "__main__":
  cli.run(main)
