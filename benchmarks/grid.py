"""Trains and evaluates a small grid as a user would, and breaks down the wall-clock time.

    python -m benchmarks.grid
    python -m benchmarks.grid --grid_parallel=1 --grid_overrides=train.steps=40

`begin` is the time until a cell's process begins its run (process start, imports, data), `steps`
that of its training steps, and `rest` the remainder: initialization, compilation, checkpoints,
shutdown. `speed` covers only the later steps. Time outside the processes of cells is the
launcher's. Prints a table, then the same figures as JSON.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib import metadata
from typing import Any

from absl import flags

from benchmarks.iso_solver import machine
from moe_jax import cli
from moe_jax.design.sheet import Sheet, print_sheet
from moe_jax.errors import require
from moe_jax.files import read_json
from moe_jax.grid import Cell
from moe_jax.run_dir import RunDir

_EXPERIMENT = flags.DEFINE_string("grid_experiment", "experiments/quickstart.py", "Which grid.")
_PARALLEL = flags.DEFINE_integer("grid_parallel", 2, "Number of cells trained concurrently.")
_OVERRIDES = flags.DEFINE_list("grid_overrides", [], "Overrides, e.g. train.steps=40.")

ROOT = pathlib.Path(__file__).parent.parent


def measure(experiment: str, overrides: Sequence[str], parallel: int, out: str) -> dict[str, Any]:
  """Returns the seconds of training, evaluation and each cell. Raises RuntimeError on failure."""
  arguments = [f"--config={experiment}", f"--out={out}",
               *(f"--config.{override}" for override in overrides)]
  train = _seconds("launch.submit", *arguments, "--backend=local", f"--parallel={parallel}")
  steps = list(pathlib.Path(out, "_compilation_cache").glob("jit_step-*-cache"))
  evaluate = _seconds("moe_jax.evaluate", *arguments)
  rows = {cell.name: of_cell(cell, out) for cell in cells_of(experiment, overrides)}
  return {"seconds": {"train": train, "evaluate": evaluate}, "compiled_steps": len(steps),
          "cells": rows}


def cells_of(experiment: str, overrides: Sequence[str]) -> tuple[Cell, ...]:
  return cli.selected_cells(experiment, [f"--config.{override}" for override in overrides])


def _seconds(module: str, *arguments: str) -> float:
  started = time.perf_counter()
  done = subprocess.run([sys.executable, "-m", module, *arguments], cwd=ROOT, text=True,
                        capture_output=True, check=False)
  if done.returncode:
    raise RuntimeError(done.stdout[-1000:] + done.stderr[-1000:])
  return time.perf_counter() - started


def of_cell(cell: Cell, out: str) -> dict[str, float]:
  """Breaks down the seconds of a cell's process, from its run directory."""
  run, tokens, training = RunDir.of(out, cell), cell.config.batch_tokens, 0.0
  step = cell.config.train.branch_step or 0  # its trunk ran the steps before
  launched, status = read_json(run.launch), run.read_status()
  for row in run.read_metrics():
    training += (row["step"] - step) * tokens / row["tokens_per_second"]
    step = row["step"]
  whole, begin = launched["ended"] - launched["started"], status["started"] - launched["started"]
  return {"begin": begin, "steps": training, "rest": whole - begin - training, "whole": whole,
          "tokens_per_second": status["tokens_per_second"]}


def main(overrides: list[str]) -> None:
  cli.no_overrides(overrides)
  require(_PARALLEL.value >= 1, "grid_parallel", _PARALLEL.value, "must be at least 1")
  cells_of(_EXPERIMENT.value, _OVERRIDES.value)  # fail early on invalid flags
  with tempfile.TemporaryDirectory() as out:
    found = measure(_EXPERIMENT.value, _OVERRIDES.value, _PARALLEL.value, out)
  sheet = Sheet(f"{_EXPERIMENT.value}, {_PARALLEL.value} at a time [s]", ["cell"],
                ["begin", "steps", "rest", "whole", "speed [tokens/s]"],
                f"Training took {found['seconds']['train']:.0f} s, evaluation "
                f"{found['seconds']['evaluate']:.0f} s; {found['compiled_steps']} steps compiled.")
  for name, row in found["cells"].items():
    sheet.add(name, *(f"{row[part]:.1f}" for part in ("begin", "steps", "rest", "whole")),
              f"{row['tokens_per_second']:.0f}")
  print_sheet(sheet)
  print(json.dumps({"machine": machine(), "jax": metadata.version("jax"),
                    "load_average": os.getloadavg(), "parallel": _PARALLEL.value, **found},
                   indent=2))


if __name__ == "__main__":
  cli.run(main)
