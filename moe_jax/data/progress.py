"""Reports the progress of data preparation on stderr: a bar on a terminal, else plain lines."""

import time
from collections.abc import Callable

import rich.console
import rich.progress

PLAIN_SECONDS = 10.0


class Progress:
  """Context manager that counts processed bytes and reports them.

  Without a terminal it prints a line at most every PLAIN_SECONDS, and a final one only if an
  earlier one was printed, so that quick work prints nothing.
  """

  def __init__(self, name: str, total_bytes: int, console: rich.console.Console | None = None,
               clock: Callable[[], float] = time.monotonic):
    self._name, self._total, self._clock = name, max(total_bytes, 1), clock
    self._console = console or rich.console.Console(stderr=True)
    self._live = self._console.is_terminal and not self._console.is_dumb_terminal
    self._done, self._began, self._printed_at = 0, clock(), clock()
    self._first: int | None = None
    self._printed: int | None = None  # value of _done in the last printed line

  def __enter__(self) -> "Progress":
    if self._live:
      self._bar = rich.progress.Progress(
          rich.progress.TextColumn("{task.description}", markup=False),
          rich.progress.BarColumn(), rich.progress.DownloadColumn(),
          rich.progress.TransferSpeedColumn(), rich.progress.TimeRemainingColumn(),
          console=self._console, transient=True)
      self._task = self._bar.add_task(self._name, total=self._total)
      self._bar.start()
    return self

  def __exit__(self, kind, *_) -> None:
    if self._live:
      self._bar.stop()
    elif self._printed not in (None, self._done) and kind is None:
      self._print()

  def skip(self, n_bytes: int) -> None:
    """Counts bytes that an earlier attempt processed; they are excluded from the speed."""
    self._done += n_bytes
    if self._live:
      self._bar.update(self._task, total=self._total, advance=n_bytes)

  def advance(self, n_bytes: int) -> None:
    if self._first is None:
      self._first = self._done
    self._done += n_bytes
    if self._live:
      self._bar.update(self._task, advance=n_bytes)
    elif self._clock() - self._printed_at >= PLAIN_SECONDS:
      self._print()

  def _print(self) -> None:
    seconds = max(self._clock() - self._began, 1e-9)
    speed = (self._done - (self._first or 0)) / seconds
    left = (self._total - self._done) / max(speed, 1e-9)
    self._console.file.write(
        f"{self._name}: {self._done / 1e6:,.0f} of {self._total / 1e6:,.0f} MB, "
        f"{speed / 1e6:.1f} MB/s" + (f", {left:,.0f} s left" if left > 0 else "") + "\n")
    self._console.file.flush()
    self._printed_at, self._printed = self._clock(), self._done
