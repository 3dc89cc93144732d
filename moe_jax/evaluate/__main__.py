"""Evaluates the finished cells of a grid: a table, results.csv and a plot.

    python -m moe_jax.evaluate --config=experiments/quickstart.py

What is evaluated already is not done again. Execution flags say how to run, e.g.
--config.execution.mesh.expert=4 or --config.execution.microbatches=4 for smaller batches.
"""

import os
import sys

from absl import flags, logging

from moe_jax import cli, cluster
from moe_jax.errors import FieldError

_CONFIG = cli.define_config_flag()
_OUT = flags.DEFINE_string("out", "runs", "Directory of all experiments, local or gs://.")


def main(overrides: list[str]) -> int:
  logging.set_verbosity(logging.WARNING)
  cells = cli.selected_cells(_CONFIG.value, overrides)
  if cluster.is_one_of_many(os.environ):
    print("error: evaluation is the work of one process and this is one of several: start it "
          "once, on one host with its own devices (a run of any number of processes is "
          "evaluated there)", file=sys.stderr)
    return cli.EXIT_BAD_INPUT
  from moe_jax.evaluate import results
  from moe_jax.evaluate.cells import evaluate_cells, survey
  found = survey(cells, _OUT.value)
  for line in found.unfinished:
    print(line, flush=True)
  problems = found.refused
  for line in problems:
    print(line, file=sys.stderr)
  if not found.finished:
    raise FieldError("out", _OUT.value, f"holds no finished cell of {_CONFIG.value}; train "
                     f"with: python -m launch.submit --config={_CONFIG.value} --out="
                     f"{_OUT.value}")
  failed = evaluate_cells(found.finished, _OUT.value,
                          say=lambda line: print(line, flush=True))

  experiment = cells[0].experiment
  rows, unreadable = results.collect(_OUT.value, experiment)
  for line in unreadable:
    print(line, file=sys.stderr)
  heldout = {row["cell"]: row for row in rows if row["evaluation"] == "heldout"}
  unwritten = []
  shown = [heldout[cell.name] for cell in found.finished if cell.name in heldout]
  if shown:
    from moe_jax.evaluate.show import show
    unwritten = show(rows, shown, results.csv_path(_OUT.value, experiment))
    for line in unwritten:
      print(line, file=sys.stderr)
  return 1 if problems or failed or unreadable or unwritten else 0


if __name__ == "__main__":
  cli.run(main)
