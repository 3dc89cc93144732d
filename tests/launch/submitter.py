"""`launch.submit` with the trainer of this folder: python submitter.py SPEC OUT PARALLEL B...

Each B is the behavior of one cell, in order.
"""

import pathlib
import sys

from launch.backends import local
from launch.jobs import Job
from moe_jax import grid
from moe_jax.run_dir import RunDir

TRAINER = pathlib.Path(__file__).with_name("trainer.py")


def jobs_of(spec, out, behaviors, overrides=()):
  """One job a cell, each with its own behavior."""
  cells = grid.select(spec)
  return [Job(cell, RunDir.of(out, cell),
              (sys.executable, str(TRAINER), behavior, f"--config={cell.selector}",
               f"--out={out}", *overrides))
          for cell, behavior in zip(cells, behaviors, strict=True)]


if __name__ == "__main__":
  _, spec, out, parallel, *behaviors = sys.argv
  sys.exit(local.submit(jobs_of(spec, out, behaviors), int(parallel)))
