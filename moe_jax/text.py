"""Numbers and names as people read them. No JAX."""

import re
from collections.abc import Collection, Sequence


def short(number: float | None) -> str:
  """Three digits: 1234567 as `1.23M`; nothing for None."""
  if number is None:
    return ""
  for unit in ("", "k", "M", "B"):
    if abs(number) < 999.5:
      return f"{number:.3g}{unit}"
    number /= 1000
  return f"{number:.3g}T"


def natural(name: str) -> list[str | int]:
  """The key that sorts l2 before l10."""
  return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def aligned(rows: Sequence[tuple[str, ...]], left: Collection[int] = (0,)) -> list[str]:
  """A line a row, columns as wide as they need, never cut: those in `left` to the left, numbers
  to the right.

  Made by hand: for 1,000 rows rich's table takes longer than reading their files.
  """
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return ["  ".join(cell.ljust(width) if i in left else cell.rjust(width)
                    for i, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip()
          for row in rows]
