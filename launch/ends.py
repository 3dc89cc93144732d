"""How a trainer's process ended for each of the cells that it trained, and what it left."""

import contextlib
import os

from moe_jax import run_dir as run_dir_lib
from moe_jax.errors import FieldError
from moe_jax.files import is_local, read_json
from moe_jax.run_dir import RunDir

_EXIT_OF_STATE = {
    run_dir_lib.FINISHED: 0, run_dir_lib.PREEMPTED: run_dir_lib.EXIT_PREEMPTED,
    run_dir_lib.DIVERGED: run_dir_lib.EXIT_DIVERGED, run_dir_lib.FAILED: 1}


def own_code(run_dir: RunDir, pid: int, code: int) -> int | None:
  """The exit code that the trainer would have had if it had trained this cell alone.

  Args:
    run_dir: of the cell.
    pid: of the process, which trained others beside it.
    code: with which it ended, the worst of what became of them.

  Returns:
    None where the process has said nothing of this cell.
  """
  with contextlib.suppress(FieldError):
    status = run_dir.read_status()
    if status.get("pid") == pid:
      return _EXIT_OF_STATE.get(status["state"], code)
  return None


def told_error(run_dir: RunDir, pid: int) -> str | None:
  """The error in the status that the process left, in one line, or None."""
  with contextlib.suppress(FieldError):
    status = run_dir.read_status()
    if status.get("pid") == pid and status.get("error"):
      return " ".join(status["error"].split())
  return None


def is_finished(run_dir: RunDir) -> bool:
  """Whether the run is done and its end is still there. Raises FieldError on a damaged status."""
  return (run_dir.read_status().get("state") == run_dir_lib.FINISHED
          and lost_end(run_dir) is None)


def lost_end(run_dir: RunDir) -> str | None:
  """What is wrong with the last checkpoint of a run that has finished, as a phrase, or None.

  A look at names and sizes, where the trainer reads every byte; it comes to no harsher verdict.
  On an object store, where a file is there whole or not at all and each look is a request, it is
  not taken. Raises FieldError on a damaged status.
  """
  status = run_dir.read_status()
  if status.get("state") != run_dir_lib.FINISHED or not is_local(run_dir.path):
    return None
  steps = [int(folder.name) for folder in run_dir.checkpoints.glob("[0-9]*")
           if folder.name.isdecimal()]
  if not steps:  # all were deleted, which is somebody's wish
    return None
  last = max(steps)
  if last != status.get("step", last):
    return f"its last checkpoint is that of step {last} of {status['step']}"
  try:
    listed = read_json(run_dir.checksums(last))
    changed = next((name for name, entry in listed.items()
                    if _size(run_dir.checkpoints / str(last) / name) != entry["bytes"]), None)
  except (FieldError, AttributeError, KeyError, TypeError):
    return "the checksums of its last checkpoint are missing or damaged"
  return None if changed is None else (
      f"its last checkpoint is damaged: {changed} is missing or cut off")


def _size(file: os.PathLike) -> int | None:
  try:
    return os.stat(file).st_size
  except OSError:
    return None
