"""python -m moe_jax.train --config=experiments/quickstart.py:CELL --out=runs

Trains a cell. FILE:CELL,CELL trains several, one after another; cells of one shape train together
if --config.execution.population is above 1.
For a run of several processes, start this command in each. On Cloud TPU, GKE and SLURM they find
each other; elsewhere pass --coordinator_address, --num_processes and --process_id.
"""

import os
import re
import signal
import sys

from absl import flags, logging

from moe_jax import cli, cluster, run_dir
from moe_jax.errors import FieldError, require
from moe_jax.files import is_of_storage
from moe_jax.memory import use_huge_pages
from moe_jax.population import deal

_CONFIG = cli.define_config_flag()
_OUT = flags.DEFINE_string("out", "runs", "Directory of all experiments, local or gs://; all "
                           "processes of a run must see it.")
_COORDINATOR = flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0, "
                                   "which all others can reach; any free port.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Number of processes of the run; 1 "
                                      "does not look for others.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Index of this process, from 0.")
_PROFILE = flags.DEFINE_string("profile_steps", None, "FIRST:LAST, e.g. 10:12: profiles these "
                               "steps, of process 0, into the run's profile/, for xprof.")


def main(overrides: list[str]) -> int:
  logging.set_verbosity(logging.WARNING)  # Orbax logs every file at INFO
  cells = cli.selected_cells(_CONFIG.value, overrides)
  groups = deal(cells)
  if (len(cells) != 1 and ":" not in _CONFIG.value
      and max(cell.config.execution.population for cell in cells) == 1):
    raise FieldError("config", _CONFIG.value, f"has {len(cells)} cells and names none: "
                     "add :CELL or :CELL,CELL, or use launch.submit for all; "
                     "--config.execution.population=8 trains up to 8 of one shape together. "
                     "Cells: " + ", ".join(cell.name for cell in cells))
  arguments = cluster.meeting(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value,
                              os.environ)
  profile_steps = _profile_steps(_PROFILE.value, min(cell.config.train.steps for cell in cells))
  from moe_jax import processes  # imports JAX, so only after the input has been checked
  from moe_jax.train.checkpoint import CheckpointError
  from moe_jax.train.loop import train_together

  def body() -> int:
    codes = [0]
    for group in groups:  # sequentially; the exit code is the highest of all groups
      try:
        codes.append(train_together(group, _OUT.value, profile_steps))
      except (CheckpointError, run_dir.RunDirBusy) as error:  # only affects this group
        if len(groups) == 1 or arguments is not None:
          raise
        code, line = _ending(error)
        print(f"error: {line}", file=sys.stderr, flush=True)
        codes.append(code)
      if codes[-1] == run_dir.EXIT_PREEMPTED:
        return codes[-1]
    return max(codes)

  try:
    return processes.run(body, arguments, _ending)
  except Exception as error:
    known = _ending(error)
    if known is None or isinstance(error, FieldError):
      raise
    code, line = known
    print(f"error: {line}", file=sys.stderr, flush=True)
    if is_of_storage(error):
      os._exit(code)  # on a full disk the exit handlers of libraries fail too, with long tracebacks
    return code


def _profile_steps(text: str | None, steps: int) -> tuple[int, int] | None:
  """`10:12` -> (10, 12). Raises FieldError."""
  if text is None:
    return None
  match = re.fullmatch(r"([0-9]{1,15}):([0-9]{1,15})", text)
  first, last = map(int, match.groups()) if match else (0, 0)
  require(1 <= first <= last <= steps, "profile_steps", text,
          f"must be FIRST:LAST, two steps from 1 to {steps}")
  return first, last


def _ending(error: BaseException) -> tuple[int, str] | None:
  """Exit code and error message for expected exceptions; None for others."""
  from moe_jax.train.checkpoint import CheckpointError
  match error:
    case FieldError():
      return cli.EXIT_BAD_INPUT, f"--{error}"
    case run_dir.RunDirBusy():
      return run_dir.EXIT_BUSY, str(error)
    case CheckpointError():
      return 1, str(error)
    case Exception() if is_of_storage(error):
      return 1, (f"{' '.join(str(error).split())}; checkpoints are kept; run the same command to "
                 "resume")
    case KeyboardInterrupt():
      return 128 + signal.SIGINT, "interrupted; what was finished is kept"
  return None


if __name__ == "__main__":
  use_huge_pages()
  cli.run(main)
