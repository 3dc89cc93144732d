"""Starts, polls and stops a trainer as a child process of the agent."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence

# Within a pod's grace period; a spot VM may be gone after 30 s, saved or not.
STOP_SECONDS = 100.0


class Trainer:
  """A running trainer, in a process group of its own."""

  def __init__(self, command: Sequence[str], environ: Mapping[str, str]):
    self.command = (sys.executable, *command[1:])
    self._process = subprocess.Popen(self.command, stdin=subprocess.DEVNULL,
                                     env={**os.environ, **environ}, start_new_session=True)
    self.pid = self._process.pid
    self.started = time.time()

  def poll(self) -> int | None:
    """Returns the exit code (negative: the signal that killed it), or None while it runs."""
    if self._process.returncode is None and self._process.poll() is not None:
      # Kill workers that it left behind, at once: later their group's id may be reused.
      with contextlib.suppress(ProcessLookupError):
        os.killpg(self.pid, signal.SIGKILL)
    return self._process.returncode

  def stop(self, patience: float = STOP_SECONDS, sleep: Callable[[float], None] = time.sleep
           ) -> int:
    """Asks it to save and end; kills it after `patience` seconds. Returns the exit code."""
    self._process.terminate()
    deadline = time.monotonic() + patience
    while self.poll() is None and time.monotonic() < deadline:
      sleep(0.1)
    return self.kill() if self._process.returncode is None else self._process.returncode

  def kill(self) -> int:
    with contextlib.suppress(ProcessLookupError):
      os.killpg(self.pid, signal.SIGKILL)
    return self._process.wait()
