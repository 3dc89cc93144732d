"""Fits a law to results.csv and says what the data show and cannot show.

    python -m moe_jax.laws --results=runs/grid/results.csv --law=paper
"""

from absl import flags

from moe_jax import cli
from moe_jax.errors import FieldError
from moe_jax.laws.claims import MARGIN
from moe_jax.laws.forms import FORMS
from moe_jax.laws.reduce import to_cells
from moe_jax.laws.report import report
from moe_jax.laws.table import read_results

_RESULTS = flags.DEFINE_string("results", None, "results.csv of an experiment.", required=True)
_LAW = flags.DEFINE_string("law", "paper", f"The form to fit: {', '.join(FORMS)}.")
_WHERE = flags.DEFINE_multi_string(
    "where", [], "COLUMN=VALUE: keep these rows alone, e.g. state=finished. May be repeated.")
_WITHOUT = flags.DEFINE_list("without", [], "Cells to leave out, by name.")
_MARGIN = flags.DEFINE_float("margin", MARGIN, "Effects below it, a unit of ln x, count as "
                             "none in the equivalence tests.")
_DRAWS = flags.DEFINE_integer("draws", 999, "Draws of the bootstrap.", lower_bound=99)
_SEED = flags.DEFINE_integer("seed", 0, "Of starts and bootstrap.")


def main(overrides: list[str]) -> None:
  if overrides:
    field, _, value = overrides[0].removeprefix("--").partition("=")
    raise FieldError(field, value, "is not a flag of this command; it reads --results")
  rows = read_results(_RESULTS.value, _WHERE.value, _WITHOUT.value)
  cells = to_cells(rows, _RESULTS.value)
  print("\n".join(report(cells, _LAW.value, _MARGIN.value, _DRAWS.value, _SEED.value)))


if __name__ == "__main__":
  cli.run(main)
