"""Parses human-readable quantities: 200M, 9B, 1T, 16GB, 32GiB."""

import math
import re

from moe_jax.errors import FieldError

_COUNT = {"": 1, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}
_BYTES = {"": 1e9, "gb": 1e9, "g": 1e9, "gib": 2**30, "mb": 1e6, "mib": 2**20, "tb": 1e12,
          "tib": 2**40}
_NUMBER = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)\s*([a-z]*)", re.IGNORECASE)


def parse_count(field: str, text: str) -> float:
  """Parses `200M` as 2e8; units are k, M, B or G, T. Raises FieldError naming the flag."""
  return _parse(field, text, _COUNT, "must be a number above 0 such as 200M, 9B, 1T or 2e8")


def parse_gigabytes(field: str, text: str) -> float:
  """Parses a size in decimal gigabytes: `16`, `16GB` -> 16; `16GiB` -> 17.18. Raises FieldError."""
  return _parse(field, text, _BYTES, "must be a size above 0 such as 16, 16GB or 32GiB") / 1e9


def parse_range(field: str, text: str) -> tuple[float, float]:
  """Parses `32:128` as (32, 128). Raises FieldError."""
  parts = text.split(":")
  try:
    low, high = (float(part) for part in parts)
  except ValueError:
    low = high = math.nan
  if not (0 < low <= high < math.inf):
    raise FieldError(field, text, "must be LOW:HIGH, both above 0, such as 32:128")
  return low, high


def _parse(field: str, text: str, units: dict[str, float], accepted: str) -> float:
  match = _NUMBER.fullmatch(text.strip())
  if match is None or match[2].lower() not in units:
    raise FieldError(field, text, accepted)
  value = float(match[1]) * units[match[2].lower()]
  if not 0 < value < math.inf:
    raise FieldError(field, text, accepted)
  return value
