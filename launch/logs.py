"""Follows the log of a slice's machines.

    python -m launch.logs --out=gs://BUCKET/runs --experiment=NAME --slice=NAME --worker=0

Ctrl-C stops following; the slice continues.
"""

import os
import sys

from absl import flags

from launch import submitted
from moe_jax import cli
from moe_jax.errors import require

_OUT, _EXPERIMENT = submitted.define_flags()
_SLICE = flags.DEFINE_string("slice", None, "Name of the slice; required if there are several.")
_WORKER = flags.DEFINE_string("worker", "0", "Number of the machine, or all; on SLURM, number of "
                              "the array task.")
_LINES = flags.DEFINE_integer("lines", 100, "Number of past lines to show first.", lower_bound=0)
_FOLLOW = flags.DEFINE_bool("follow", True, "Keep following the log.")
_CONTEXT = flags.DEFINE_string("kube_context", None, "kubectl context; by default the current one.")


def main(overrides: list[str]) -> int:
  del overrides
  folder = submitted.folder_of(_OUT.value, _EXPERIMENT.value)
  found = [(backend, one) for backend, folders in submitted.submissions(folder).items()
           for one in folders]
  one = submitted.one_of([folder for _, folder in found], _SLICE.value)
  backend = next(backend for backend, folder in found if folder == one)
  line = submitted.log_command(one, backend, _WORKER.value, _LINES.value, _FOLLOW.value,
                               _CONTEXT.value)
  sys.stdout.flush()
  try:
    os.execvp(line[0], line)
  except FileNotFoundError:
    require(False, "slice", one.name, f"needs {line[0]}, which is not on PATH")


if __name__ == "__main__":
  cli.run(main)
