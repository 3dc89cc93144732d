"""Trains every cell of a grid.

    python -m launch.submit --config=experiments/quickstart.py --backend=local

Finished cells are skipped, all others start or go on where they stopped: the same command
is the way to begin, to resume, and to retry. `--dry_run` prints what would be run.
"""

import dataclasses

from absl import flags

from launch import backends, together
from launch.jobs import plan
from launch.table import shapes
from moe_jax import cli

_CONFIG = cli.define_config_flag()
_OUT = flags.DEFINE_string("out", "runs", "Root of the run directories.")
_BACKEND = flags.DEFINE_enum("backend", "local", backends.names(), "Where the cells run.")
_PARALLEL = flags.DEFINE_integer("parallel", 1, "How many cells run at a time.",
                                 lower_bound=1)
_PROCESSES = flags.DEFINE_integer("processes", 1, "Processes of each run, on this machine: for "
                                  "a look at how many behave.", lower_bound=1)
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the commands, run nothing.")


def main(overrides: list[str]) -> int:
  cells = cli.selected_cells(_CONFIG.value, overrides)
  jobs = [dataclasses.replace(job, command=together.command(_PROCESSES.value, job.command))
          for job in plan(cells, _OUT.value, overrides)]
  backend = backends.load(_BACKEND.value)
  if _DRY_RUN.value:  # a script that a shell can run
    print("\n".join([*("# " + line for line in shapes(cells)), *backend.dry_run(jobs)]))
    return 0
  print("\n".join(shapes(cells)), flush=True)
  return backend.submit(jobs, _PARALLEL.value)


if __name__ == "__main__":
  cli.run(main)
