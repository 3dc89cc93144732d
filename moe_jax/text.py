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
