"""Formats plans as tables for the terminal and as flat rows for CSV and JSON. No JAX here."""

from collections.abc import Sequence
from typing import Any

import rich.box
import rich.table

from moe_jax.arch import count
from moe_jax.arch.hardware import PRICES_AS_OF
from moe_jax.config import identity_hash
from moe_jax.plan import cost
from moe_jax.plan.cells import Plan
from moe_jax.text import short

_GIB = 2**30


def table(plans: Sequence[Plan], price: float | None) -> rich.table.Table:
  """One line per cell: whether it fits, its step time by part, and its cost."""
  shown = rich.table.Table(box=rich.box.SIMPLE_HEAD)
  shown.add_column("cell", no_wrap=True)
  for name in ("N_total", "N_active", "arguments", "temporaries", "GiB/device", "left", "fits",
               "compiled s", "step ms", "XLA's", "priced", *cost.PARTS, "MFU", "tokens/s",
               "chip-hours", "USD"):
    shown.add_column(name, justify="right", no_wrap=True)
  for plan in plans:
    arch = plan.config.arch
    sizes = (short(count.n_total(arch)), short(count.n_active(arch)))
    if plan.fits is None:
      shown.add_row(plan.cell, *sizes, "", "", "", "", "failed")
      continue
    memory = (f"{plan.hbm_needed / _GIB:.1f} / {plan.hbm_there / _GIB:.4g}",
              f"{plan.hbm_left / _GIB:.1f}")
    if not plan.result:
      shown.add_row(plan.cell, *sizes, "", "", *memory, "no")
      continue
    result = plan.result
    parts = [f"{result['parts'][part] / plan.seconds:.0%}" for part in cost.PARTS]
    usd = plan.usd(price)
    parted = [f"{result['memory'][what] / _GIB:.1f}" for what in ("arguments", "temporaries")]
    shown.add_row(plan.cell, *sizes, *parted, *memory, "yes" if plan.fits else "no",
                  f"{result['compile_seconds']:.0f}", f"{plan.seconds * 1e3:.1f}",
                  f"{result['estimated_seconds'] * 1e3:.1f}",
                  f"{result['priced_seconds'] * 1e3:.1f}", *parts, f"{plan.mfu:.1%}",
                  short(plan.tokens_per_second),
                  "" if plan.chip_hours is None else f"{plan.chip_hours:.4g}",
                  "" if usd is None else f"{usd:,.0f}")
  return shown


def collectives(plans: Sequence[Plan]) -> rich.table.Table:
  """One line per cell, kind and mesh axes: bytes per device and time of a step's collectives."""
  shown = rich.table.Table(box=rich.box.SIMPLE_HEAD)
  shown.add_column("cell", no_wrap=True)
  shown.add_column("collective", no_wrap=True)
  for name in ("MB/device", "exposed ms", "hidden ms"):
    shown.add_column(name, justify="right", no_wrap=True)
  for plan in plans:
    for found in plan.result.get("collectives", ()):
      shown.add_row(plan.cell, f"{found['kind']} over {found['axes']}",
                    f"{found['bytes'] / 1e6:,.1f}", f"{found['exposed_seconds'] * 1e3:.2f}",
                    f"{found['hidden_seconds'] * 1e3:.2f}")
  return shown


def by_size(rows: Sequence[dict[str, Any]]) -> rich.table.Table | None:
  """One line per size (N_total) with the ranges of its cells.

  Returns None if there is only one size, or every cell has its own. Neighboring sizes within 20 %
  of each other count as one: they were meant to be equal.

  Args:
    rows: the rows that `row` returned.
  """
  groups: list[list[dict[str, Any]]] = []
  for flat in sorted(rows, key=lambda flat: flat["n_total"]):
    if not groups or flat["n_total"] > 1.2 * groups[-1][-1]["n_total"]:
      groups.append([])
    groups[-1].append(flat)
  if len(groups) in (1, len(rows)):
    return None
  shown = rich.table.Table(box=rich.box.SIMPLE_HEAD)
  for name in ("N_total", "cells", "fit", "GiB/device", "step ms", "MFU", "chip-hours", "USD"):
    shown.add_column(name, justify="right", no_wrap=True)
  for group in groups:
    timed = [flat for flat in group if flat["step_seconds"]]

    def span(name: str, scale: float, form: str, among: list[dict[str, Any]] = timed) -> str:
      values = [flat[name] * scale for flat in among if flat[name] is not None]
      ends = list(dict.fromkeys(format(end(values), form) for end in (min, max))) if values else []
      return " to ".join(ends)

    hours, usd = (sum(flat[name] or 0 for flat in group) for name in ("chip_hours", "usd"))
    shown.add_row(short(sum(flat["n_total"] for flat in group) / len(group)), str(len(group)),
                  str(sum(bool(flat["fits"]) for flat in group)),
                  span("hbm_needed", 1 / _GIB, ".1f", group), span("step_seconds", 1e3, ".0f"),
                  span("mfu", 1, ".0%"), f"{hours:,.4g}", f"{usd:,.0f}" if usd else "")
  return shown


def summary(plans: Sequence[Plan], price: float | None) -> str:
  """States what the grid costs, and how far to trust the figure."""
  priced = [plan for plan in plans if plan.chip_hours is not None]
  remedied = sum(not plan.fits for plan in priced)
  hours = sum(plan.chip_hours for plan in priced)
  label = plans[0].topology.label
  line = f"{len(priced)} of {len(plans)} cells planned on {label}"
  told = [f"{remedied} with the remedy under which it fits"] if remedied else []
  if len(priced) < len(plans):
    told.append(f"{len(plans) - len(priced)} excluded from the sum")
  line += (f" ({', '.join(told)})" if told else "") + f": {hours:,.4g} chip-hours"
  if price is not None:
    line += f", USD {hours * price:,.0f} at {price:g} a chip-hour"
  return (line + ". Times are XLA's estimates plus what this model prices: meant as a lower bound, "
          f"uncalibrated. Default prices: {PRICES_AS_OF}.")


def memory_profile(plan: Plan) -> str:
  """Lists the largest buffers alive at peak memory, one line each."""
  if not plan.result:
    return f"{plan.cell}: no buffers are known, because XLA did not compile the program"
  lines = [f"{plan.cell}: the largest live buffers at peak memory"]
  for buffer in plan.result.get("largest", ()):
    where = buffer["source"].rpartition("moe_jax/")[2] or buffer["op_name"]
    lines.append(f"  {buffer['bytes'] / 2**20:9.1f} MiB  {buffer['shape']:<28} {where}")
  return "\n".join(lines)


def row(plan: Plan, price: float | None) -> dict[str, Any]:
  """Returns everything known about one cell as a flat dict."""
  arch, result = plan.config.arch, plan.result
  flat = {
      "cell": plan.cell, "identity": identity_hash(plan.config),
      "topology": plan.topology.label, "chips": plan.topology.chips,
      "n_total": count.n_total(arch), "n_active": count.n_active(arch),
      "fits": plan.fits, "error": plan.error, "remedy": plan.remedy,
      "remedy_seconds": plan.remedy_seconds,
      "hbm_needed": plan.hbm_needed, "hbm_there": plan.hbm_there, "hbm_left": plan.hbm_left,
      **{f"hbm_{name}": value for name, value in result.get("memory", {}).items()},
      **{f"mesh_{axis}": size for axis, size in result.get("mesh", {}).items()},
      "remat": plan.config.execution.remat,
      "microbatches": plan.config.execution.microbatches,
      "compile_seconds": result.get("compile_seconds"),
      "step_seconds": plan.seconds, "estimated_seconds": result.get("estimated_seconds"),
      "priced_seconds": result.get("priced_seconds"),
      "estimated_cycles": result.get("estimated_cycles"),
      "flops_per_device": result.get("flops"),
      **{f"seconds_{part}": result["parts"][part] for part in (cost.PARTS if result else ())},
      "mfu": plan.mfu, "tokens_per_second": plan.tokens_per_second,
      "steps": plan.config.train.steps, "chip_hours": plan.chip_hours, "usd": plan.usd(price)}
  for collective in result.get("collectives", ()):
    name = f"{collective['kind']}[{collective['axes']}]"
    flat[f"{name}_bytes"] = collective["bytes"]
    flat[f"{name}_exposed_seconds"] = collective["exposed_seconds"]
    flat[f"{name}_hidden_seconds"] = collective["hidden_seconds"]
  return flat
