"""Shows the measured cost of inference as a table and a figure. No JAX."""

import os
from collections.abc import Sequence
from typing import Any

import rich.box
import rich.table

from moe_jax.errors import require
from moe_jax.evaluate.results import INFERENCE, Row, csv_path
from moe_jax.evaluate.table import print_made
from moe_jax.files import write_bytes
from moe_jax.grid import Cell
from moe_jax.laws.publish import style
from moe_jax.laws.publish.page import png
from moe_jax.run_dir import RunDir
from moe_jax.text import short


def parse_batch_sizes(text: str) -> tuple[int, ...]:
  """`1,8,32` -> (1, 8, 32). Raises FieldError."""
  parts = [part.strip() for part in text.split(",")]
  require(all(part.isdecimal() and 0 < int(part) <= 65536 for part in parts), "batch_sizes", text,
          "must be numbers of sequences such as 1,8,32")
  return tuple(sorted({int(part) for part in parts}))


def columns(result: dict[str, Any]) -> Row:
  """Returns the columns for results.csv; the suffix in `decode_ms_b8` is the batch size."""
  found = {"inference_device_kind": result["device_kind"],
           "inference_n_devices": result["n_devices"], "inference_dtype": result["dtype"],
           "inference_context": result["context"], "weight_bytes": result["weight_bytes"],
           "cache_bytes_per_sequence": result["cache_bytes_per_sequence"],
           "memory_bytes_per_second": result["memory_bytes_per_second"]}
  for each in result["measured"]:
    found |= {f"{name}_b{each['batch']}": value for name, value in each.items()
              if name != "batch"}
  return found


def show(out: str | os.PathLike, cells: Sequence[Cell], rows: Sequence[Row]) -> list[str]:
  """Prints the table, writes cost.png, and returns a line for each problem."""
  found = {cell.name: RunDir.of(out, cell).read_eval(INFERENCE) for cell in cells}
  found = {name: result for name, result in found.items() if result is not None}
  if not found:
    return []
  print_made(table(found))
  made = figure(rows)
  if made is not None:
    path = csv_path(out, cells[0].experiment).with_name("cost.png")
    try:
      write_bytes(path, png(made))
      print(path)
    except OSError as error:
      return [f"{path.name}: not written: {error}"]
  return []


def batch_sizes(row: Row) -> list[int]:
  """Returns the batch sizes measured in a row of results.csv, ascending."""
  return sorted(int(name.removeprefix("decode_ms_b")) for name, value in row.items()
                if name.startswith("decode_ms_b") and value is not None)


def measured(rows: Sequence[Row]) -> list[Row]:
  return [row for row in rows if batch_sizes(row)]


def table(found: dict[str, dict[str, Any]]) -> rich.table.Table:
  """One line per cell and batch size; `found` maps each cell to its eval/inference.json."""
  one = next(iter(found.values()))
  made = rich.table.Table(
      box=rich.box.SIMPLE_HEAD, pad_edge=False, caption_justify="left", caption=(
          f"Measured on {one['n_devices']} x {one['device_kind']}, contexts of {one['context']} "
          f"tokens, {one['dtype']}; its memory moves {one['memory_bytes_per_second'] / 1e9:.1f} "
          "GB/s.\nlimit: time to read the bytes of a step at that bandwidth. roofline: the "
          "estimate of moe_jax.design.\nBoth are lower bounds if no data stays in a cache."))
  made.add_column("cell", no_wrap=True)
  for name in ("weights", "cache/sequence", "batch", "prefill tokens/s", "decode ms", "limit ms",
               "limit/measured", "roofline ms"):
    made.add_column(name, justify="right", no_wrap=True)
  for cell, result in found.items():
    for number, each in enumerate(result["measured"]):
      made.add_row(
          cell if not number else "",
          f"{result['weight_bytes'] / 1e6:.3g} MB" if not number else "",
          f"{result['cache_bytes_per_sequence'] / 1e6:.3g} MB" if not number else "",
          str(each["batch"]), short(each["prefill_tokens_per_second"]),
          f"{each['decode_ms']:.3g}", f"{each['decode_limit_ms']:.3g}",
          f"{each['decode_bandwidth_fraction']:.1%}", f"{each['decode_roofline_ms']:.3g}")
  return made


def figure(rows: Sequence[Row]):
  """Plots held-out loss against the measured time of a decode step.

  One panel each for the smallest and largest batch size that all rows have; returns None if none.
  """
  rows = measured(rows)
  if not rows:
    return None
  common = sorted(set.intersection(*(set(batch_sizes(row)) for row in rows)))
  shown = list(dict.fromkeys((common[0], common[-1]))) if common else []
  if not shown:
    return None
  made = style.new_figure(4.2)
  panels = made.subplots(1, len(shown), sharey=True, squeeze=False)[0]
  for axes, batch in zip(panels, shown, strict=True):
    for number, row in enumerate(rows):
      axes.errorbar(row[f"decode_ms_b{batch}"], row["loss"], yerr=row["loss_se"] or 0, capsize=3,
                    color=style.COLORS[number % len(style.COLORS)], markersize=7, linestyle="",
                    marker=style.MARKERS[number % len(style.MARKERS)], label=row["cell"])
    axes.set_xlabel(f"measured decode step, {batch} sequence{'s' * (batch > 1)} (ms)", fontsize=10)
    axes.margins(x=0.12)
    style.clean(axes)
  panels[0].set_ylabel("held-out loss (nats per token)", fontsize=10)
  panels[-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
  return made
