"""Times the start of `python -m moe_jax.train` up to the first step, by stage.

    python -m benchmarks.startup

Each start runs the trainer on one cell in a new process, which exits after its first step. `new`
starts from an empty directory, `cold` with prepared data but no compiled program, `cached` with
both. Each stage lasts from the end of the one before: import, data (the corpus, its tokenizer and
tokens), state (run directory, initial parameters), compile, first step. The figures are medians
over --startup_starts starts, except for `new`, which has one. Prints a table, then the same figures
as JSON.
"""

import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata

from absl import flags

from benchmarks.iso_solver import machine
from benchmarks.startup_child import STAGES
from moe_jax import cli
from moe_jax.design.sheet import Sheet, print_sheet
from moe_jax.errors import require

_CELL = flags.DEFINE_string("startup_cell", "experiments/quickstart.py:l2-d108-f58-e16-k4",
                            "Cell to train, FILE:CELL.")
_STARTS = flags.DEFINE_integer("startup_starts", 3, "Number of starts; the median counts.")

ROOT = pathlib.Path(__file__).parent.parent


def start(cell: str, out: pathlib.Path) -> dict[str, float]:
  """Returns the seconds of each stage. Raises RuntimeError if the trainer takes no step."""
  done = subprocess.run(
      [sys.executable, "-m", "benchmarks.startup_child", str(time.time()), f"--config={cell}",
       f"--out={out}"], cwd=ROOT, text=True, capture_output=True, check=False)
  lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
  if not lines:
    raise RuntimeError(done.stderr[-2000:])
  return json.loads(lines[-1])


def measure(cell: str, starts: int, out: pathlib.Path) -> dict[str, dict[str, float]]:
  """Returns the seconds of each stage of a new, a cold and a cached start."""
  found = {"new": [start(cell, out)], "cold": [], "cached": []}
  for name in ("cold", "cached"):
    for _ in range(starts):
      for kept in out.iterdir():  # for a cold start, the compilation cache goes, too
        if kept.name != "_data" and (name == "cold" or kept.name != "_compilation_cache"):
          shutil.rmtree(kept)
      found[name].append(start(cell, out))
  return {name: {stage: statistics.median(row[stage] for row in rows) for stage in STAGES}
          for name, rows in found.items()}


def main(overrides: list[str]) -> None:
  cli.no_overrides(overrides)
  require(_STARTS.value >= 1, "startup_starts", _STARTS.value, "must be at least 1")
  require(len(cli.selected_cells(_CELL.value, [])) == 1, "startup_cell", _CELL.value,
          "must be one cell, FILE:CELL")
  with tempfile.TemporaryDirectory() as out:
    found = measure(_CELL.value, _STARTS.value, pathlib.Path(out))
  sheet = Sheet(f"to the first step of {_CELL.value} [s]", ["start"], [*STAGES, "whole"])
  for name, row in found.items():
    sheet.add(name, *(f"{row[stage]:.2f}" for stage in STAGES), f"{sum(row.values()):.2f}")
  print_sheet(sheet)
  print(json.dumps({"machine": machine(), "jax": metadata.version("jax"),
                    "load_average": os.getloadavg(), "cell": _CELL.value, "seconds": found},
                   indent=2))


if __name__ == "__main__":
  cli.run(main)
