"""A table with a title and a caption, printed at full width even if the output is a pipe."""

import dataclasses
import textwrap
from collections.abc import Sequence

import rich.box
import rich.console
import rich.measure
import rich.table

_WIDE = 10_000


@dataclasses.dataclass
class Sheet:
  """Rows of text under column names.

  Attributes:
    title, caption: lines above and below the table.
    left, right: names of the left-aligned columns, and of the right-aligned ones after them.
    rows: one text per column.
  """

  title: str
  left: Sequence[str]
  right: Sequence[str]
  caption: str = ""
  rows: list[Sequence[str]] = dataclasses.field(default_factory=list)

  def add(self, *cells: str) -> None:
    self.rows.append(cells)


def print_sheet(sheet: Sheet) -> None:
  """Prints the table to standard output at its full width."""
  made = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
  for column in sheet.left:
    made.add_column(column, no_wrap=True)
  for column in sheet.right:
    made.add_column(column, justify="right", no_wrap=True)
  for row in sheet.rows:
    made.add_row(*row)
  console = rich.console.Console(markup=False, highlight=False, width=_WIDE)
  console.width = rich.measure.Measurement.get(console, console.options, made).maximum
  with console.capture() as text:
    console.print(made)
  lines = (line.rstrip() for line in text.get().splitlines() if line.strip())
  print("\n" + sheet.title, *lines, *textwrap.wrap(sheet.caption, 100), sep="\n")
