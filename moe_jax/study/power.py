"""Power analysis: the effect a grid of this size and noise can detect, before or after it is run.

    python -m moe_jax.study.power --config=experiments/quickstart.py --law=paper-curved
    python -m moe_jax.study.power --results=runs/quickstart/results.csv
"""

from absl import flags

from moe_jax import cli
from moe_jax.errors import FieldError, require
from moe_jax.laws import power
from moe_jax.laws.cells import Cells
from moe_jax.laws.fit import fit
from moe_jax.laws.flags import define_law_flag, define_rows_flags
from moe_jax.laws.forms import Form, form_for
from moe_jax.laws.identify import Identified, identify
from moe_jax.laws.information import Design, Noise, design_of
from moe_jax.laws.power import MARGIN, Margin
from moe_jax.laws.reduce import to_cells
from moe_jax.laws.table import read_results
from moe_jax.study import noise as noise_lib
from moe_jax.study.sample import not_yet_run
from moe_jax.text import aligned

_CONFIG = cli.define_config_flag(required=False)
_RESULTS = flags.DEFINE_string("results", None, "results.csv of a grid that has been run; the "
                               "noise is estimated from it.")
_LAW = define_law_flag()
_WHERE, _WITHOUT = define_rows_flags(cells_of="--config or --results")
_SEED_SD, _ARCHITECTURE_SD = noise_lib.define_flags()
_FOLD = flags.DEFINE_float("fold", MARGIN.fold, "Report effects as percent of the loss for a "
                           "variable that grows by this factor.")
_MARGIN = flags.DEFINE_float("margin_percent", MARGIN.percent, "Margin of the equivalence "
                             "test, in percent of the loss when a variable grows by the factor "
                             "--fold.")


def main(overrides: list[str]) -> None:
  require((_CONFIG.value is None) != (_RESULTS.value is None), "config", _CONFIG.value,
          "give either --config, an experiment file, or --results")
  margin = Margin(_MARGIN.value, _FOLD.value)
  if _RESULTS.value is None:
    cells = not_yet_run(cli.selected_cells(_CONFIG.value, overrides), _WITHOUT.value)
    noise = noise_lib.given(_SEED_SD.value, _ARCHITECTURE_SD.value)
    found, design = planned(cells, _LAW.value)
  else:
    require(not overrides, "results", _RESULTS.value, "cannot be combined with --config.PATH=VALUE")
    cells = to_cells(read_results(_RESULTS.value, _WHERE.value, _WITHOUT.value),
                     _RESULTS.value)
    found, design, noise = measured(cells, _LAW.value, _SEED_SD.value, _ARCHITECTURE_SD.value)
  print("\n".join(report(cells, found, design, noise, margin)))


def planned(cells: Cells, law: str) -> tuple[Identified, Design]:
  """Returns the design of a grid that has not been run. Raises FieldError unless log-log."""
  found = identify(form_for(law, cells), cells)
  return found, design_of(found.form, cells)


def measured(cells: Cells, law: str, seed_sd: float | None = None,
             architecture_sd: float | None = None) -> tuple[Identified, Design, Noise]:
  """Like `planned`, for results that exist, with their noise."""
  fitted = fit(cells, law)
  noise = noise_lib.measured(fitted, seed_sd, architecture_sd)
  return fitted.identified, design_of(fitted.form, cells, fitted.least_squares.theta), noise


def report(cells: Cells, found: Identified, design: Design, noise: Noise,
           margin: Margin) -> list[str]:
  """Returns the lines that the command prints."""
  fold = margin.fold
  repeated = Design(design.parameters, design.x_NP, design.architecture_N, 2 * design.seeds_N)
  twice = {p.parameter: p for p in power.power_of(repeated, noise, margin.slope)}
  lines = [*cells.notes, f"noise: {noise}", *found.lines(),
           f"two-sided tests at 5 %, {100 * power.POWER:.0f} % power; effects in percent of the "
           f"loss when the variable grows {fold:g}-fold"]
  rows = [("coefficient", "of ln", "df", "95 % interval", "detectable", "twice the seeds",
           "shown absent below", f"chance for {margin.percent:g} %")]
  for one in power.power_of(design, noise, margin.slope):
    variable = _variable(found.form, one.parameter)
    if variable is not None:
      half, least, with_two, absent = (
          f"{power.percent_over(value, fold):.2f} %" for value in
          (one.half_width, one.detectable, twice[one.parameter].detectable, one.margin))
      rows.append((one.parameter, variable, f"{one.df:.3g}", f"± {half}", least, with_two, absent,
                   f"{100 * one.at_margin:.0f} %"))
  if len(rows) == 1:
    raise FieldError("law", found.form.name, "has no slope of ln L along one variable: use a "
                     "log-log form, such as paper")
  return lines + aligned(rows, left=(0, 1))


def _variable(form: Form, parameter: str) -> str | None:
  """Returns the variable along which a parameter is the slope of ln L, or None."""
  if not form.is_linear:
    return None
  basis = form.terms[0][parameter]
  return basis.columns[0] if basis.sign else None


if __name__ == "__main__":
  cli.run(main)
