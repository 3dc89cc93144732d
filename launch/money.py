"""Computes what an experiment's slices cost, and whether that would pass its limit. Pure."""

import math
from collections.abc import Iterable

from launch import slices
from launch.options import option
from launch.slices import Record
from moe_jax.errors import require
from moe_jax.plan.topology import Topology

PRICE_OPTION = option("Price of a chip-hour in US dollars; defaults to the catalog's on-demand "
                      "price, an upper bound for spot.", default=None)
MAX_COST_OPTION = option("Spending limit of the experiment in US dollars; all slices end before it "
                         "is exceeded.", default=None)
_AT_RISK = (slices.CREATING, slices.QUEUED, slices.ACTIVE, slices.DELETING)  # may have machines


def require_money(price: float | None, limit: float | None, topology: Topology) -> None:
  """Raises FieldError unless both are valid amounts or None, and a limit has a known price."""
  require(price is None or (math.isfinite(price) and price >= 0), "usd_per_chip_hour", price,
          "must be 0 or more")
  require(limit is None or (math.isfinite(limit) and limit > 0), "max_cost_usd", limit,
          "must be above 0")
  require(limit is None or usd_per_second(topology, price) is not None, "max_cost_usd", limit,
          f"needs --usd_per_chip_hour: {topology.hardware.name} has no public price")


def usd_per_second(topology: Topology, price: float | None) -> float | None:
  """Returns the US dollars per second of all slices of a run, or None if unknown. `price`, per
  chip-hour, replaces the catalog's."""
  usd = topology.hardware.usd_per_chip_hour if price is None else price
  return None if usd is None else usd * topology.chips / 3600


def spent(accounts: Iterable[tuple[Record, float]]) -> float:
  """Returns the US dollars spent so far; accounts are (slice record, US dollars per second)."""
  return sum(record.held_seconds * rate for record, rate in accounts)


def would_pass(accounts: Iterable[tuple[Record, float]], one: Record, limit: float, now: float,
               margin: float) -> bool:
  """Whether keeping, or requesting, the slice `one` could pass the limit.

  An upper bound: each slice that may have machines is assumed to have had them since the cloud
  was last asked, and to keep them for `margin` more seconds, while a deletion takes effect.
  """
  total = 0.0
  for record, rate in accounts:
    total += record.held_seconds * rate
    if record.state in _AT_RISK:
      total += (now - (record.looked or now) + margin) * rate
    elif record.name == one.name:
      total += margin * rate
  return total >= limit
