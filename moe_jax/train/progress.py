"""Displays a run's progress: a live line on a terminal, occasional plain lines elsewhere."""

import datetime
import time
from collections.abc import Callable

import rich.console
import rich.progress
from rich.table import Column

PLAIN_SECONDS = 5.0


class Progress:
  """Shows the progress of a run within the context.

  On a terminal it is one line that is redrawn. Elsewhere (a pipe, a log file) it is plain
  lines: the first update, then at most one per PLAIN_SECONDS, and always the last.
  """

  def __init__(self, total_steps: int, name: str = "",
               console: rich.console.Console | None = None,
               clock: Callable[[], float] = time.monotonic):
    """Sets up the display.

    Args:
      total_steps: step at which the run ends.
      name: of the run.
      console: console to write to; standard output if None.
      clock: returns seconds, for the time left and the time between plain lines.
    """
    self._total, self._name, self._clock = total_steps, name, clock
    self._console = console or rich.console.Console()
    self._live = self._console.is_terminal and not self._console.is_dumb_terminal
    self._start: tuple[int, float] | None = None
    self._printed_at = -float("inf")
    self._unprinted: str | None = None

  def __enter__(self) -> "Progress":
    if self._live:
      self._bar = rich.progress.Progress(
          rich.progress.BarColumn(table_column=Column(width=6)),
          rich.progress.TextColumn("{task.description}", markup=False, table_column=Column(
              ratio=1, no_wrap=True, overflow="ellipsis")),
          console=self._console, auto_refresh=False, expand=True)
      self._task = self._bar.add_task(self._name, total=self._total)
      self._bar.start()
    return self

  def __exit__(self, *_) -> None:
    if self._live:
      self._bar.stop()
    elif self._unprinted is not None:
      self._print(self._unprinted)

  def update(self, step: int, *, loss: float | None = None,
             tokens_per_second: float | None = None, mfu: float | None = None,
             drop_rate: float | None = None) -> None:
    """Shows that `step` steps have been taken. Values that are None are omitted.

    Args:
      step: optimizer steps taken.
      loss: nats per token.
      tokens_per_second: of all devices together.
      mfu: model FLOPs utilization, between 0 and 1.
      drop_rate: share of the assignments that found no slot, between 0 and 1.
    """
    facts = [f"{step}/{self._total}", self._time_left(step)]
    if loss is not None:
      facts.append(f"loss {loss:.4f}")
    if tokens_per_second is not None:
      facts.append(f"{tokens_per_second:,.0f} tok/s")
    if mfu is not None:
      facts.append(f"MFU {mfu:.1%}")
    if drop_rate is not None:
      facts.append(f"drop {drop_rate:.1%}")
    facts = [fact for fact in facts if fact]
    if self._live:  # the name comes last, since the end of the line is cut off if it does not fit
      line = "  ".join([*facts, self._name])
      self._bar.update(self._task, completed=step, description=line, refresh=True)
      return
    line = "  ".join([self._name, *facts] if self._name else facts)
    due = self._clock() - self._printed_at >= PLAIN_SECONDS
    if due or step >= self._total:
      self._print(line)
    else:
      self._unprinted = line

  def _time_left(self, step: int) -> str:
    """Formats the time left, from the speed since the first update, so without compilation."""
    now = self._clock()
    if self._start is None:
      self._start = step, now
    first, began = self._start
    if step <= first:
      return ""
    seconds = (now - began) / (step - first) * max(self._total - step, 0)
    return f"{datetime.timedelta(seconds=round(seconds))} left"

  def _print(self, line: str) -> None:
    self._console.file.write(line + "\n")  # rich's print() would wrap it at 80 columns
    self._console.file.flush()
    self._printed_at, self._unprinted = self._clock(), None
