"""Writes the same table as CSV (eight significant digits), Markdown and HTML (human-readable)."""

import csv
import dataclasses
import html
import io
import math
from typing import Any


@dataclasses.dataclass(frozen=True)
class Table:
  """Rows of text and numbers.

  Attributes:
    columns: headings.
    rows: one value per column; None and NaN are empty fields.
  """

  columns: tuple[str, ...]
  rows: tuple[tuple[Any, ...], ...]

  def csv(self) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(self.columns)
    writer.writerows([_exact(value) for value in row] for row in self.rows)
    return text.getvalue()

  def markdown(self) -> str:
    shown = self._without_empty()
    lines = [shown.columns, ["---"] * len(shown.columns),
             *[[readable(value).replace("|", "\\|") for value in row] for row in shown.rows]]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)

  def html(self) -> str:
    shown = self._without_empty()
    head = "".join(f"<th>{html.escape(name)}</th>" for name in shown.columns)
    body = "\n".join("<tr>" + "".join(_field(value) for value in row) + "</tr>"
                     for row in shown.rows)
    return (f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n'
            "</tbody></table></div>")

  def _without_empty(self) -> "Table":
    """Drops the columns that are empty in every row; the CSV keeps them."""
    kept = [i for i in range(len(self.columns))
            if not self.rows or any(readable(row[i]) for row in self.rows)]
    return Table(tuple(self.columns[i] for i in kept),
                 tuple(tuple(row[i] for i in kept) for row in self.rows))


def _missing(value: Any) -> bool:
  return value is None or (isinstance(value, float) and math.isnan(value))


def _exact(value: Any) -> str:
  if _missing(value):
    return ""
  return f"{value:.8g}" if isinstance(value, float) else str(value)


def readable(value: Any) -> str:
  """Formats for reading: whole numbers with thousands separators, others to five digits."""
  if _missing(value):
    return ""
  if isinstance(value, float):
    if not value.is_integer() or abs(value) >= 1e15:
      return f"{value:.5g}"
    value = int(value)
  return f"{value:,}" if isinstance(value, int) else str(value)


def _field(value: Any) -> str:
  kind = ' class="number"' if isinstance(value, (int, float)) else ""
  return f"<td{kind}>{html.escape(readable(value))}</td>"
