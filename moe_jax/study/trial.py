"""Tests the design tool: its choice for a budget against random architectures of that budget.

    python -m moe_jax.study.trial --results=runs/study/results.csv --law=paper-curved \\
        --where=tokens=99975168 --memory_gb=0.013 --active_params=3M \\
        --write=experiments/study/trial.py
    python -m moe_jax.study.trial --rank=experiments/study/trial.py \\
        --results=runs/study-trial/results.csv

The first command writes an experiment file: the choice, then --others random architectures that
use up the same budget, drawn with --seed. The second reports the rank of the choice.
"""

from absl import flags

from moe_jax import cli
from moe_jax.design.units import parse_count, parse_gigabytes
from moe_jax.errors import require
from moe_jax.grid import Grid, load_grid
from moe_jax.laws.fit import fit
from moe_jax.laws.flags import define_law_flag, define_rows_flags
from moe_jax.laws.reduce import to_cells
from moe_jax.laws.table import read_results
from moe_jax.study import contest, rates
from moe_jax.study.noise import SEED_SD
from moe_jax.study.so_far import so_far
from moe_jax.study.write import check_free, write_experiment

_RESULTS = flags.DEFINE_string("results", None, "results.csv of the runs that the law is fitted "
                               "to or, with --rank, of the trial.", required=True)
_CONFIG = flags.DEFINE_string("config", None, "Experiment file of the runs; needed if the runs' "
                              "config.json files are not next to the table.")
_LAW = define_law_flag()
_WHERE, _WITHOUT = define_rows_flags()
_MEMORY = flags.DEFINE_string("memory_gb", None, "Memory for weights and the cache of one "
                              "sequence, e.g. 0.013.")
_ACTIVE = flags.DEFINE_string("active_params", None, "Maximum number of active parameters, e.g. "
                              "3M.")
_OTHERS = flags.DEFINE_integer("others", 10, "Number of random architectures to compare with "
                               "the choice.")
_SEED = flags.DEFINE_integer("seed", 0, "Random seed of the draw.")
_RATES = flags.DEFINE_string("rates", None, "File of moe_jax.study.learning_rate that sets the "
                             "learning rates; default: those of the nearest runs.")
_WRITE = flags.DEFINE_string("write", None, "Experiment file to write; must not exist yet.")
_RANK = flags.DEFINE_string("rank", None, "Experiment file of a trial that has been run.")
_SEED_SD = flags.DEFINE_float("seed_sd", SEED_SD, "Standard deviation of ln L between seeds.")


def main(overrides: list[str]) -> None:
  cli.no_overrides(overrides)
  if _RANK.value is not None:
    require(_WRITE.value is None, "rank", _RANK.value, "cannot be combined with --write")
    rows = read_results(_RESULTS.value, _WHERE.value, _WITHOUT.value)
    print("\n".join(contest.rank(load_grid(_RANK.value), rows, _SEED_SD.value)))
    return
  for flag in (_MEMORY, _ACTIVE):
    require(flag.value is not None, flag.name, None, "is needed for the budget")
  memory = parse_gigabytes("memory_gb", _MEMORY.value)
  active = parse_count("active_params", _ACTIVE.value)
  if _WRITE.value is not None:
    check_free(_WRITE.value)
  law = None if _RATES.value is None else rates.read(_RATES.value)
  rows = read_results(_RESULTS.value, _WHERE.value, _WITHOUT.value)
  cells = to_cells(rows, _RESULTS.value)
  history = so_far([row for runs in cells.runs for row in runs], _RESULTS.value, _CONFIG.value)
  found = contest.contest(fit(cells, _LAW.value), history, memory, active, _OTHERS.value,
                          _SEED.value, law)
  print("\n".join(found.lines(history.recipe)))
  if _WRITE.value is not None:
    grid = Grid(f"{history.experiment}-trial", history.recipe, found.configs)
    write_experiment(_WRITE.value, grid, "Is the design tool's choice better than others of its "
                     "budget? The first cell is the choice.\n\n" + "\n".join(found.notes[:1])
                     + "\nMade by python -m moe_jax.study.trial.")
    print(f"written: {_WRITE.value}")


if __name__ == "__main__":
  cli.run(main)
