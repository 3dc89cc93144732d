"""Prints the results of evaluations as a table."""

from collections.abc import Sequence

import rich.box
import rich.console
import rich.measure
import rich.table

from moe_jax.evaluate.results import SEEN_THE_FUTURE, Row
from moe_jax.text import short


def table(rows: Sequence[Row]) -> rich.table.Table:
  """One line per cell: its size, losses and routing statistics."""
  caption = ("Losses in nats per token; ± one standard error over "
             f"{rows[0]['heldout_documents']} documents.")
  domains = _domains(rows)
  if not all(row["causal"] for row in rows):
    caption += f"\n* NOT CAUSAL: {SEEN_THE_FUTURE}."
  made = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False, caption_justify="left",
                          caption=caption)
  made.add_column("cell", no_wrap=True)
  for name in ("step", "N_total", "N_active", "s", "loss", "at capacity", "bits/byte", "dropped",
               "load variation", "unigram loss"):
    made.add_column(name, justify="right", no_wrap=True)
  for label in domains:
    made.add_column(f"{label} bits/byte", justify="right", no_wrap=True)
  for row in rows:
    made.add_row(
        row["cell"], str(row["step"]), short(row["n_total"]), short(row["n_active"]),
        f"{row['sparsity']:.3g}", _pm(row["loss"], row["loss_se"]) + "*" * (not row["causal"]),
        f"{row['loss_at_capacity']:.4f}", f"{row['bits_per_byte']:.4f}",
        _or_dash(row["drop_rate"], ".2%"), _or_dash(row["load_variation"], ".2f"),
        f"{row['unigram_loss']:.4f}",
        *(_or_dash(row.get(f"bits_per_byte.{label}"), ".4f") for label in domains))
  return made


def _domains(rows: Sequence[Row]) -> list[str]:
  """Returns the labels of the domains that any row has."""
  return list(dict.fromkeys(name.removeprefix("bits_per_byte.") for row in rows for name in row
                            if name.startswith("bits_per_byte.")))


def print_table(rows: Sequence[Row]) -> None:
  print_made(table(rows))


def print_made(made: rich.table.Table) -> None:
  """Prints a table at its full width, even if standard output is a pipe or narrower."""
  console = rich.console.Console(markup=False, highlight=False)
  wide = console.options.update(width=10_000)
  width = rich.measure.Measurement.get(console, wide, made).maximum
  console.width = max(console.width, width)
  console.print(made)


def _pm(value: float, se: float | None) -> str:
  return f"{value:.4f}" if se is None else f"{value:.4f} ± {se:.4f}"


def _or_dash(value: float | None, form: str) -> str:
  return "-" if value is None else format(value, form)
