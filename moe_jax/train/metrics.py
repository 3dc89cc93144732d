"""Writes a run's metrics as JSON lines, which survive a kill, and to TensorBoard.

Lines go to `metrics/<attempt>-<first step>.jsonl`. An object store cannot append, so the current
file is rewritten as a whole each time; it stays short because each checkpoint starts a new one.
`RunDir.read_metrics` merges the files of all attempts.
"""

import json
import math
import os
import time
from collections.abc import Callable, Mapping

import tensorboardX

from moe_jax.files import write_text
from moe_jax.run_dir import RunDir

FLUSH_SECONDS = 5.0


class MetricsWriter:
  """Writes one attempt's metrics. Of several processes, only process 0 has one."""

  def __init__(self, run_dir: RunDir, attempt: int, step: int,
               clock: Callable[[], float] = time.monotonic):
    """Begins the metrics of an attempt.

    Args:
      run_dir: of the run.
      attempt: number of this attempt, RunDir.next_attempt().
      step: steps taken so far; this attempt only writes later ones, and TensorBoard hides what
        earlier attempts wrote for these.
      clock: returns seconds, for the time between flushes.
    """
    self._run_dir, self._attempt, self._clock = run_dir, attempt, clock
    self._first: int | None = None
    self._lines: list[str] = []
    self._flushed_at = clock()
    self._board = tensorboardX.SummaryWriter(
        os.fspath(run_dir.tensorboard), purge_step=step + 1,
        filename_suffix=f".{attempt:04d}")  # two attempts may start in the same second

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Adds the metrics of a step; flushes if the last flush was FLUSH_SECONDS ago.

    A value that is not finite becomes null in the file, as strict JSON has no NaN.
    """
    numbers = {name: float(value) for name, value in values.items()}
    record = {"step": step} | {name: value if math.isfinite(value) else None
                               for name, value in numbers.items()}
    if self._first is None:
      self._first = step
    self._lines.append(json.dumps(record, allow_nan=False) + "\n")
    for name, value in numbers.items():
      self._board.add_scalar(name, value, step)
    if self._clock() - self._flushed_at >= FLUSH_SECONDS:
      self.flush()

  def flush(self) -> None:
    """Writes what was added so far. Raises OSError, with one line, if the disk is full."""
    self._flushed_at = self._clock()
    if self._first is not None:
      write_text(self._run_dir.metrics_file(self._attempt, self._first),
                             "".join(self._lines))
    self._board.flush()

  def next_chunk(self) -> None:
    """Flushes and starts a new file; to be called at each checkpoint."""
    self.flush()
    self._first, self._lines = None, []

  def close(self) -> None:
    self.flush()
    self._board.close()
