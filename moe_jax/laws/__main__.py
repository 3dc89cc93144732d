"""Fits a scaling law to results.csv and reports what the data do and do not show.

    python -m moe_jax.laws --results=runs/grid/results.csv --law=paper --report=report.html

The report is a single self-contained page; `report_files/` next to it has every figure as PNG and
every table as CSV and Markdown. The output is deterministic: the same results give the same bytes.
"""

from absl import flags

from moe_jax import cli
from moe_jax.laws import intervals
from moe_jax.laws.analysis import analyse
from moe_jax.laws.flags import define_law_flag, define_rows_flags
from moe_jax.laws.power import MARGIN, Margin
from moe_jax.laws.publish.page import check_path, publish
from moe_jax.laws.publish.sections import law_sections, lead_of, title_of
from moe_jax.laws.reduce import to_cells
from moe_jax.laws.report import report
from moe_jax.laws.table import read_results

_RESULTS = flags.DEFINE_string("results", None, "results.csv of an experiment.", required=True)
_LAW = define_law_flag()
_WHERE, _WITHOUT = define_rows_flags()
_REPORT = flags.DEFINE_string("report", None, "Path of the .html report; its figures and "
                              "tables go into a folder next to it.")
_MARGIN = flags.DEFINE_float("margin_percent", MARGIN.percent, "Margin of the equivalence "
                             "tests, in percent of the loss when a variable grows by the "
                             "factor --fold.")
_FOLD = flags.DEFINE_float("fold", MARGIN.fold, "Factor by which the variable grows, for "
                           "--margin_percent.")
_DRAWS = flags.DEFINE_integer("draws", intervals.DRAWS, "Number of bootstrap draws.",
                              lower_bound=99)
_SEED = flags.DEFINE_integer("seed", 0, "Random seed of the solver starts and the "
                             "bootstrap.")


def main(overrides: list[str]) -> None:
  cli.no_overrides(overrides)
  margin = Margin(_MARGIN.value, _FOLD.value)
  if _REPORT.value is not None:
    check_path(_REPORT.value)
  rows = read_results(_RESULTS.value, _WHERE.value, _WITHOUT.value)
  cells = to_cells(rows, _RESULTS.value)
  found = analyse(cells, _LAW.value, margin, _DRAWS.value, _SEED.value)
  print("\n".join(report(found)))
  if _REPORT.value is not None:
    files = publish(_REPORT.value, title_of(found), lead_of(found),
                    law_sections(found, _RESULTS.value))
    print(f"{files[0]}, and {len(files) - 1} figures and tables in {files[1].parent}/")


if __name__ == "__main__":
  cli.run(main)
