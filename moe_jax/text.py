"""Numbers and names as people read them. No JAX."""

import re


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


def aligned(rows: list[tuple[str, ...]], left: int = 1) -> list[str]:
  """A line a row, columns aligned: the first `left` of them to the left, numbers to the right."""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return ["  ".join(cell.ljust(width) if i < left else cell.rjust(width)
                    for i, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip()
          for row in rows]
