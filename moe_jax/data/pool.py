"""Runs independent jobs in several processes, skipping those that are already done."""

import concurrent.futures
import multiprocessing
import os
import pathlib
import signal
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from moe_jax.data.progress import Progress
from moe_jax.errors import FieldError

# Below this a second process takes longer to start than it saves.
_ALONE_BYTES = 8_000_000


class Job(NamedTuple):
  """A unit of work.

  Attributes:
    result: the file whose existence marks the job as done.
    size: bytes to read, for the progress report.
    arguments: arguments of the function; both are pickled for another process.
  """

  result: pathlib.Path
  size: int
  arguments: tuple[Any, ...]


def default_processes() -> int:
  """Number of CPU cores that this process may use."""
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(name: str, function: Callable[..., None], jobs: Sequence[Job], processes: int) -> None:
  """Calls `function(*job.arguments)` for each job that is not done, in any order.

  Args:
    name: label of the progress report.
    function: a module-level function; it writes job.result last and atomically
      (cache.write_whole).
    jobs: all jobs, those already done included.
    processes: number of worker processes; with 1, the jobs run in this process.

  Raises:
    FieldError: the first one raised by `function`, or a worker was killed. Results written so
      far are kept.
  """
  left = [job for job in jobs if not job.result.exists()]
  n_bytes = sum(job.size for job in left)
  with Progress(name, sum(job.size for job in jobs)) as progress:
    progress.skip(sum(job.size for job in jobs) - n_bytes)
    if processes == 1 or len(left) <= 1 or n_bytes < _ALONE_BYTES:
      for job in left:
        function(*job.arguments)
        progress.advance(job.size)
    else:
      _run_in_processes(function, left, min(processes, len(left)), progress)


def _run_in_processes(function: Callable[..., None], jobs: Sequence[Job], processes: int,
                      progress: Progress) -> None:
  # Not fork: threads of this process (TFDS, tokenizers) may hold locks.
  executor = concurrent.futures.ProcessPoolExecutor(
      processes, multiprocessing.get_context("spawn"), initializer=_begin_worker)
  try:
    sizes = {executor.submit(function, *job.arguments): job.size for job in jobs}
    for future in concurrent.futures.as_completed(sizes):
      future.result()
      progress.advance(sizes[future])
    executor.shutdown()
  except concurrent.futures.process.BrokenProcessPool:
    raise FieldError("processes", processes, "one of them was killed, perhaps because memory "
                     "ran out: run the same command with fewer to resume") from None
  finally:
    executor.shutdown(wait=False, cancel_futures=True)


def _begin_worker() -> None:
  """Makes a worker exit when its parent does, for whatever reason, and ignore Ctrl-C."""
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism

  def follow() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)

  threading.Thread(target=follow, daemon=True).start()
