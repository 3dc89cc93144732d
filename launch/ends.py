"""Reads how a trainer's process ended for each of its cells, and whether the results are intact."""

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
  """Returns the exit code the trainer would have had if it had trained this cell alone.

  Args:
    run_dir: the cell's run directory.
    pid: the process, which trained other cells beside this one.
    code: the exit code of the process, the worst over its cells.

  Returns:
    The code, or None if the process has written no status for this cell.
  """
  with contextlib.suppress(FieldError):
    status = run_dir.read_status()
    if status.get("pid") == pid:
      return _EXIT_OF_STATE.get(status["state"], code)
  return None


def told_error(run_dir: RunDir, pid: int) -> str | None:
  """Returns the error in the status that the process left, in one line, or None."""
  with contextlib.suppress(FieldError):
    status = run_dir.read_status()
    if status.get("pid") == pid and status.get("error"):
      return " ".join(status["error"].split())
  return None


def is_finished(run_dir: RunDir) -> bool:
  """Whether it finished and `lost_end` finds no fault. Raises FieldError on a damaged status."""
  return (run_dir.read_status().get("state") == run_dir_lib.FINISHED
          and lost_end(run_dir) is None)


def lost_end(run_dir: RunDir) -> str | None:
  """Returns what is wrong with the last checkpoint of a finished run, as a phrase, or None.

  Checks names and sizes only, where the trainer reads every byte, and is never the stricter of
  the two. Skipped on an object store, where a file is either whole or absent and each check is a
  request. Raises FieldError on a damaged status.
  """
  status = run_dir.read_status()
  if status.get("state") != run_dir_lib.FINISHED or not is_local(run_dir.path):
    return None
  steps = [int(folder.name) for folder in run_dir.checkpoints.glob("[0-9]*")
           if folder.name.isdecimal()]
  if not steps:  # all were deleted, presumably on purpose
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
      f"its last checkpoint is damaged: {changed} is missing or truncated")


def _size(file: os.PathLike) -> int | None:
  try:
    return os.stat(file).st_size
  except OSError:
    return None
