"""Runs each compilation in its own process, so that a crash is just a result. No JAX here."""

import concurrent.futures
import contextlib
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from typing import Any

from moe_jax import config as config_lib
from moe_jax.config import RunConfig
from moe_jax.plan import worker
from moe_jax.plan.topology import Topology

# Out-of-memory messages of the C++ library, the system, Python, LLVM and tcmalloc.
_NO_MEMORY = ("bad_alloc|annot allocate memory|MemoryError|LLVM ERROR: out of memory|"
              "Unable to allocate")


def compile_apart(config: RunConfig, topology: Topology, hlo: str | None,
                  programs: str) -> dict[str, Any]:
  """Compiles a configuration and estimates its cost in a worker process; failures are results.

  Args:
    config: the cell's configuration.
    topology: the slices to compile for.
    hlo: file for the HLO text; None does not write it.
    programs: folder that caches compiled programs.

  Returns:
    What worker.compile_cell returned, or {"error": the reason in one line}.

  Raises:
    CancelledError: after `kill`.
  """
  try:
    with tempfile.TemporaryDirectory() as folder:
      request, answer = pathlib.Path(folder, "request.json"), pathlib.Path(folder, "result.json")
      request.write_text(json.dumps({
          "config": config_lib.to_dict(config), "topology": topology.name,
          "slices": topology.n_slices, "hlo": hlo, "programs": programs}))
      code, stderr = _workers.run([sys.executable, "-m", "moe_jax.plan.worker",
                                   os.fspath(request), os.fspath(answer)])
      with contextlib.suppress(FileNotFoundError, ValueError):  # the worker died before it wrote
        return json.loads(answer.read_text())
  except OSError as error:  # out of memory, processes or disk
    return {"error": f"the compiler cannot be run: {error.strerror or error}"}
  return {"error": why_it_ended(code, stderr)}


def kill() -> None:
  """Kills all running workers and prevents new ones."""
  _workers.kill()


class _Workers:
  """The running worker processes, each awaited by a thread of this process."""

  def __init__(self):
    self._lock, self._running, self._killed = threading.Lock(), set(), False

  def run(self, command: Sequence[str]) -> tuple[int, str]:
    """Returns (exit code, stderr). Raises CancelledError after `kill`."""
    with self._lock:
      if self._killed:
        raise concurrent.futures.CancelledError
      process = subprocess.Popen(command, env=os.environ | worker.ENVIRONMENT, text=True,
                                 stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
      self._running.add(process)
    _, stderr = process.communicate()
    with self._lock:
      self._running.remove(process)
      if self._killed:
        raise concurrent.futures.CancelledError
    return process.returncode, stderr

  def kill(self) -> None:
    """Kills all running workers and prevents new ones."""
    with self._lock:
      self._killed = True
      for process in self._running:
        process.kill()


_workers = _Workers()


def why_it_ended(returncode: int, stderr: str) -> str:
  """Explains in one line why a worker left no result."""
  if returncode in (-9, 137) or re.search(_NO_MEMORY, stderr):
    return worker.OUT_OF_MEMORY
  said = [line for line in stderr.splitlines() if line.strip()]
  return f"the compiler ended with {returncode}: " + (
      " ".join(said[-1].split())[:300] if said else "no error output")
