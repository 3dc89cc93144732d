"""Loss of the checkpoints of runs against step, as curves.csv, a figure and a table. No JAX."""

import os
from collections import defaultdict
from collections.abc import Sequence

import rich.box
import rich.table
from etils import epath

from moe_jax.evaluate import results
from moe_jax.evaluate.results import Row
from moe_jax.files import write_bytes
from moe_jax.laws.publish import style
from moe_jax.laws.publish.page import png


def show(out: str | os.PathLike, experiment: str, evaluation: str) -> list[str]:
  """Prints the table, writes curves.csv and curves.png of all runs, and returns the problems.

  For any other evaluation than `heldout` the files are named curves-EVALUATION.
  """
  from moe_jax.evaluate.table import print_made
  stem = "curves" if evaluation == "heldout" else f"curves-{evaluation}"
  rows, problems = results.collect(
      out, experiment, lambda run_dir: results.curve_rows_of(run_dir, evaluation), f"{stem}.csv")
  if not rows:
    return problems
  folder = results.csv_path(out, experiment).parent
  print_made(table(rows))
  for file, write in ((folder / f"{stem}.csv", lambda path: results.write_csv(path, rows)),
                      (folder / f"{stem}.png", lambda path: _plot(rows, path))):
    try:
      write(file)
      print(file)
    except OSError as error:
      problems.append(f"{file.name}: not written: {error}")
  return problems


def by_cell(rows: Sequence[Row]) -> dict[str, list[Row]]:
  """Groups rows by cell, each sorted by step."""
  found = defaultdict(list)
  for row in sorted(rows, key=lambda row: row["step"]):
    found[row["cell"]].append(row)
  return dict(found)


def table(rows: Sequence[Row]) -> rich.table.Table:
  """One line per cell, one column per step."""
  steps = sorted({row["step"] for row in rows})
  made = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False, caption_justify="left",
                          caption="Dropless loss in nats per token, by training step.")
  made.add_column("cell", no_wrap=True)
  for step in steps:
    made.add_column(str(step), justify="right", no_wrap=True)
  for cell, ours in by_cell(rows).items():
    loss = {row["step"]: f"{row['loss']:.4f}" for row in ours}
    made.add_row(cell, *(loss.get(step, "-") for step in steps))
  return made


def figure(rows: Sequence[Row], quantity: str = "loss", label: str = "loss (nats per token)"):
  """Plots a quantity against training tokens, a curve per cell; bars are one standard error."""
  made = style.new_figure(4.4)
  axes = made.subplots()
  for number, (cell, ours) in enumerate(by_cell(rows).items()):
    axes.errorbar([row["tokens"] for row in ours], [row[quantity] for row in ours],
                  yerr=[row.get(f"{quantity}_se") or 0 for row in ours], label=cell, capsize=2,
                  elinewidth=0.8, linewidth=1.4, markersize=5,
                  color=style.COLORS[number % len(style.COLORS)],
                  marker=style.MARKERS[number % len(style.MARKERS)],
                  linestyle="-" if number < len(style.COLORS) else "--")
  axes.set_xlabel("training tokens", fontsize=10)
  axes.set_ylabel(label, fontsize=10)
  style.clean(axes)
  axes.xaxis.set_major_formatter(lambda value, _: style.value_text("tokens", value))
  axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
  return made


def _plot(rows: Sequence[Row], path: epath.Path) -> None:
  write_bytes(path, png(figure(rows)))
