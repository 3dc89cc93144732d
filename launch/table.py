"""Formats rows of cells as text."""

import collections
from collections.abc import Sequence

from launch.state import CellState
from moe_jax.arch import count
from moe_jax.grid import Cell
from moe_jax.text import aligned, short


def _age(seconds: float | None) -> str:
  """Formats an age as `12 s`, `3 min`, `5 h` or `2 d`, rounded down."""
  if seconds is None:
    return ""
  for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
    if seconds >= length:
      return f"{int(seconds / length)} {unit}"
  return f"{int(seconds)} s"


def shapes(cells: Sequence[Cell]) -> list[str]:
  """Returns a table of the cells' exact sizes, and how far each is from the grid's N_total."""
  lines = [("cell", "N_total", "residual", "N_active", "s", "g")]
  for cell in cells:
    arch = cell.config.arch
    lines.append((
        cell.name, f"{count.n_total(arch):,}",
        "" if cell.residual_ppm is None else f"{cell.residual_ppm:+.0f} ppm",
        f"{count.n_active(arch):,}", f"{arch.sparsity:g}", f"{arch.granularity:.3g}"))
  return aligned(lines)


def table(rows: Sequence[CellState]) -> list[str]:
  """Returns a table of the states of cells."""
  experiments = {row.experiment for row in rows}
  lines = [("cell", "N_total", "N_active", "state", "step", "loss", "tokens/s", "heard",
            "error")]
  for row in rows:
    lines.append((
        row.cell if len(experiments) == 1 else f"{row.experiment}/{row.cell}",
        short(row.n_total), short(row.n_active), row.state,
        "" if row.steps is None else f"{row.step or 0}/{row.steps}",
        "" if row.loss is None else f"{row.loss:.4f}",
        short(row.tokens_per_second), _age(row.heartbeat_age), row.error or ""))
  return aligned(lines, left=(0, 3, 8))  # cell, state, error


def counts(rows: Sequence[CellState]) -> str:
  """Counts cells by state: `9 cells: 7 finished, 2 running`."""
  found = collections.Counter(row.state for row in rows)
  return f"{len(rows)} cells: " + ", ".join(f"{n} {state}" for state, n in found.items())


def progress(row: CellState) -> str:
  """Formats a row as `running, step 120/400, loss 2.3456, 15.2k tokens/s`, as far as known."""
  parts = [row.state]
  if row.step is not None:
    parts.append(f"step {row.step}/{row.steps}")
  if row.loss is not None:
    parts.append(f"loss {row.loss:.4f}")
  if row.tokens_per_second is not None:
    parts.append(f"{short(row.tokens_per_second)} tokens/s")
  return ", ".join(parts)
