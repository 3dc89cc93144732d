"""Shows the progress of running cells: permanent lines and a live table."""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Sequence

import rich.console
import rich.live
import rich.text

from launch.state import CellState
from launch.table import progress, table

TERMINAL_SECONDS = 1.0
PLAIN_SECONDS = 30.0


class Overview:
  """A live table of the running cells on a terminal, plain lines where there is none.

  If the terminal or pipe goes away (hang-up, `| tee` killed by the same Ctrl-C), output is
  discarded: the children matter more than what is printed about them.
  """

  def __init__(self):
    self._console = rich.console.Console(markup=False, highlight=False, emoji=False)
    # Refreshed manually: a drawing thread would be one more thing to stop.
    self._live = rich.live.Live(console=self._console, auto_refresh=False, transient=True)
    self._draws = self._console.is_terminal and not self._console.is_dumb_terminal
    self._next = time.monotonic() + (0 if self._draws else PLAIN_SECONDS)

  def __enter__(self) -> "Overview":
    if self._draws:
      self._live.start()
    return self

  def __exit__(self, *_) -> None:
    with self._surviving():
      self._live.stop()

  def line(self, text: str) -> None:
    """Prints a permanent line."""
    with self._surviving():
      if self._draws:
        self._console.print(text, soft_wrap=True)
      else:
        print(text, flush=True)

  def show(self, running: Callable[[], Sequence[CellState]], summary: str) -> None:
    """Shows the running cells; calls `running` only when a refresh is due."""
    if time.monotonic() < self._next:
      return
    rows = running()
    with self._surviving():
      if self._draws:
        self._live.update(rich.text.Text("\n".join([*table(rows), summary]), no_wrap=True,
                                         overflow="ellipsis"), refresh=True)
        self._next = time.monotonic() + TERMINAL_SECONDS
        return
      self._next = time.monotonic() + PLAIN_SECONDS
      for row in rows:
        self.line(f"{row.cell}: {progress(row)}")
      self.line(summary)

  @contextlib.contextmanager
  def _surviving(self):
    try:
      yield
    except OSError:  # discard all further output, and what is still buffered
      os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
