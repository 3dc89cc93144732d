"""Times the iso-N_total solver on a large grid at once and on single cells.

    python -m benchmarks.iso_solver

Cells are drawn at random: N_total from 1e8 to 1e11, 8 to 256 experts, top 1 to 16,
granularity 1 to 8, aspect 32 to 128, default multiples and tolerances. `at once` is one call
of solve_grid, the best of three; `alone` calls solve on some of the same cells, and every result
must equal the grid's. Prints a table, then the same figures as JSON.
"""

import json
import os
import platform
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from absl import flags
from rich import box, console, table

from moe_jax import cli
from moe_jax.arch import Architecture, IsoRefused, solve, solve_grid
from moe_jax.errors import require

_CELLS = flags.DEFINE_integer("cells", 10_000, "Number of cells in a grid.")
_ALONE = flags.DEFINE_integer("alone", 500, "Number of cells also solved one by one.")

TEMPLATE = Architecture(n_layers=1, d_model=64, d_expert=64, n_exp=1, n_topk=1, n_heads=4)


def draw_problems(n_cells: int) -> dict[str, dict[str, np.ndarray]]:
  """Names of the fixed quantities -> arguments of solve_grid, arrays [n_cells]."""
  rng = np.random.default_rng(0)
  n_total = np.exp(rng.uniform(np.log(1e8), np.log(1e11), n_cells)).astype(np.int64)
  n_exp = 2 ** rng.integers(3, 9, n_cells)
  n_topk = np.minimum(2 ** rng.integers(0, 5, n_cells), n_exp // 2)
  size = {"n_total": n_total, "n_exp": n_exp, "n_topk": n_topk}
  aspect = {"aspect": rng.uniform(32, 128, n_cells)}
  depth = {"n_layers": rng.integers(6, 49, n_cells)}
  fine = {"granularity": rng.uniform(1, 8, n_cells)}
  # N_active / N_total if 5 to 40 % of the parameters are outside the experts.
  share = n_topk / n_exp + (1 - n_topk / n_exp) * rng.uniform(0.05, 0.4, n_cells)
  active = {"n_active": (n_total * share).astype(np.int64)}
  return {"aspect, granularity": size | aspect | fine,
          "n_layers, granularity": size | depth | fine,
          "aspect, n_active": size | aspect | active,
          "n_layers, n_active": size | depth | active}


def seconds(call: Callable[[], Any]) -> tuple[float, Any]:
  start = time.perf_counter()
  result = call()
  return time.perf_counter() - start, result


def solve_alone(cell: dict[str, Any]):
  try:
    return solve(template=TEMPLATE, **cell)
  except IsoRefused:
    return None


def measure(problem: dict[str, np.ndarray], n_alone: int) -> dict[str, Any]:
  """Returns the figures of one grid. Raises RuntimeError if solve and solve_grid disagree."""
  runs = [seconds(lambda: solve_grid(template=TEMPLATE, **problem)) for _ in range(3)]
  at_once, grid = min(runs, key=lambda run: run[0])
  alone = {True: [], False: []}  # solved or refused -> seconds of each cell
  for i in range(min(n_alone, len(grid))):
    cell = {name: value[i].item() for name, value in problem.items()}
    took, solution = seconds(lambda cell=cell: solve_alone(cell))
    if (grid[i] if grid.solved[i] else None) != solution:
      raise RuntimeError(f"alone and at once disagree: {cell}")
    alone[solution is not None].append(took)
  return {
      "cells": len(grid),
      "solved": float(grid.solved.mean()),
      "median_abs_residual_ppm": float(np.nanmedian(np.abs(grid.residual_ppm))),
      "seconds_at_once": at_once,
      "microseconds_a_cell_at_once": 1e6 * at_once / len(grid),
      "cells_alone": sum(map(len, alone.values())),
      "milliseconds_a_solved_cell_alone": 1e3 * float(np.mean(alone[True] or [np.nan])),
      "milliseconds_a_refused_cell_alone": 1e3 * float(np.mean(alone[False] or [np.nan])),
  }


def machine() -> dict[str, Any]:
  processor = platform.processor() or platform.machine()
  if os.path.exists("/proc/cpuinfo"):
    with open("/proc/cpuinfo") as file:
      names = [line.partition(":")[2].strip() for line in file if "model name" in line]
    processor = names[0] if names else processor
  return {"processor": processor, "cores": os.cpu_count(),
          "python": platform.python_version(), "numpy": np.__version__}


def main(overrides: list[str]) -> None:
  cli.no_overrides(overrides)
  for flag in (_CELLS, _ALONE):
    require(flag.value >= 1, flag.name, flag.value, "must be at least 1")
  rows = {held: measure(problem, _ALONE.value)
          for held, problem in draw_problems(_CELLS.value).items()}
  figures = {"machine": machine(), "grids": rows}
  view = table.Table(box=box.SIMPLE, title=f"{_CELLS.value} cells at once, and alone")
  for column in ("held", "at once [s]", "a cell [us]", "alone [ms]", "refused alone [ms]",
                 "solved", "|residual| [ppm]"):
    view.add_column(column, justify="left" if column == "held" else "right")
  for held, row in rows.items():
    view.add_row(held, f"{row['seconds_at_once']:.3f}",
                 f"{row['microseconds_a_cell_at_once']:.1f}",
                 f"{row['milliseconds_a_solved_cell_alone']:.2f}",
                 f"{row['milliseconds_a_refused_cell_alone']:.2f}", f"{row['solved']:.1%}",
                 f"{row['median_abs_residual_ppm']:.0f}")
  console.Console(width=100).print(view)
  print(json.dumps(figures, indent=2))


if __name__ == "__main__":
  cli.run(main)
