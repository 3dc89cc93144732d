"""Formats numbers, names and tables for people. No JAX."""

import re
from collections.abc import Collection, Sequence


def short(number: float | None) -> str:
  """Formats a number with three digits: 1234567 as `1.23M`; None as an empty string."""
  if number is None:
    return ""
  for unit in ("", "k", "M", "B"):
    if abs(number) < 999.5:
      return f"{number:.3g}{unit}"
    number /= 1000
  return f"{number:.3g}T"


def natural(name: str) -> list[str | int]:
  """A sort key that puts l2 before l10."""
  return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def aligned(rows: Sequence[tuple[str, ...]], left: Collection[int] = (0,)) -> list[str]:
  """Formats a table, one line per row; columns not in `left` are right-aligned, none is cut off.

  Not done with rich: for 1,000 rows its table takes longer than reading the rows' files.
  """
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return ["  ".join(cell.ljust(width) if i in left else cell.rjust(width)
                    for i, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip()
          for row in rows]
