"""How a trainer's process ended for each of the cells that it trained."""

import contextlib

from moe_jax import run_dir as run_dir_lib
from moe_jax.errors import FieldError
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
