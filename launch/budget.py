"""Enforces an experiment's spending limit from its own machines, so no launcher need be alive.

    <out>/<experiment>/_slices/limit.json         by submissions: the limit in US dollars
    <out>/<experiment>/_slices/NAME/used.json     by each slice's leader: the slice's cost so far

Cost is counted from when the machines start to work, across restarts; a launcher that drives the
slices counts from when machines may have existed. A TPU VM that never starts to work ends its
slice when that has cost its share of the limit (host/startup.sh).
"""

import dataclasses
import time
from collections.abc import Callable

from etils import epath

from moe_jax.files import read_as, write_json

LIMIT = "limit.json"
MARGIN_SECONDS = 200.0  # for all machines to notice the limit, save and end


@dataclasses.dataclass(frozen=True)
class _Limit:
  max_cost_usd: float | None


@dataclasses.dataclass(frozen=True)
class _Used:
  usd: float
  usd_per_second: float  # 0 once the slice has ended


def set_limit(folder: epath.Path, max_cost_usd: float | None) -> None:
  """Sets the limit of the experiment whose `_slices` folder this is; None means no limit."""
  write_json(folder / LIMIT, {"max_cost_usd": max_cost_usd})


def account(folder: epath.Path) -> list[str]:
  """Returns a line for each slice that counts its own cost and that no launcher drives."""
  return [f"{file.parent.name}: ${used.usd:.2f} since its machines started work"
          for file in sorted(folder.glob("*/used.json"))
          if not (file.parent / "slice.json").exists() and (used := read_as(_Used, file))]


class Meter:
  """Counts what one slice costs and checks the cost of all slices against the limit."""

  def __init__(self, folder: epath.Path, usd_per_second: float,
               clock: Callable[[], float] = time.monotonic):
    self._folder, self._rate, self._clock = folder, usd_per_second, clock
    before = read_as(_Used, folder / "used.json")
    self._usd, self._counted = before.usd if before else 0.0, clock()
    self.count()

  def count(self, ended: bool = False) -> None:
    """Adds the cost since the last call and writes the total to used.json."""
    now = self._clock()
    self._usd, self._counted = self._usd + (now - self._counted) * self._rate, now
    if self._rate:
      write_json(self._folder / "used.json", dataclasses.asdict(
          _Used(self._usd, 0.0 if ended else self._rate)))

  def why_too_dear(self) -> str | None:
    """Returns why nothing more may be trained, in one line, or None."""
    limit = read_as(_Limit, self._folder.parent / LIMIT)
    if limit is None or limit.max_cost_usd is None:
      return None
    used = [read_as(_Used, file) for file in self._folder.parent.glob("*/used.json")]
    if sum(one.usd + one.usd_per_second * MARGIN_SECONDS
           for one in used if one) < limit.max_cost_usd:
      return None
    return f"spending would exceed --max_cost_usd={limit.max_cost_usd:g}: ending the slice"
