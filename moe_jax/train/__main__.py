"""python -m moe_jax.train --config=experiments/quickstart.py:CELL --out=runs"""

import os
import sys

from absl import flags, logging

from moe_jax import cli
from moe_jax.errors import FieldError

_CONFIG = cli.define_config_flag()
_OUT = flags.DEFINE_string("out", "runs", "Directory of all experiments, local or gs://.")


def main(overrides: list[str]) -> int:
  logging.set_verbosity(logging.WARNING)  # Orbax tells every file at INFO
  cells = cli.selected_cells(_CONFIG.value, overrides)
  if len(cells) != 1:
    raise FieldError("config", _CONFIG.value, f"selects {len(cells)} cells and trains one: "
                     "add :CELL, or use launch.submit for all. Cells: "
                     + ", ".join(cell.name for cell in cells))
  from moe_jax import run_dir  # what follows imports JAX: bad input is answered before that
  from moe_jax.train.checkpoint import CheckpointError
  from moe_jax.train.loop import train
  try:
    return train(cells[0], _OUT.value)
  except run_dir.RunDirBusy as error:
    print(f"error: {error}", file=sys.stderr)
    return run_dir.EXIT_BUSY
  except CheckpointError as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  except OSError as error:
    print(f"error: {error}; what was saved is kept, and the same command goes on",
          file=sys.stderr, flush=True)
    os._exit(1)  # on a full disk the exit handlers of libraries fail too, with pages to tell


if __name__ == "__main__":
  cli.run(main)
