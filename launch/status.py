"""Prints the state of every cell.

    python -m launch.status --config=experiments/quickstart.py    a row for each of its cells
    python -m launch.status                                       every run under --out

`--json` prints the same rows as a list of objects; `--watch` prints them again every 30 seconds.
TPU slices are listed below the cells, with what they have used.
"""

import dataclasses
import json
import signal
import time
from collections.abc import Sequence

from absl import flags
from etils import epath

from launch import budget, driver, slices
from launch.jobs import STARTING
from launch.state import PENDING, CellState, states_of, states_under
from launch.table import counts, table
from moe_jax import cli
from moe_jax.errors import FieldError
from moe_jax.files import reaching
from moe_jax.run_dir import PREEMPTED, RUNNING

_CONFIG = cli.define_config_flag(required=False)
_OUT = flags.DEFINE_string("out", "runs", "Root of the run directories.")
_JSON = flags.DEFINE_bool("json", False, "Print JSON.")
_WATCH = flags.DEFINE_bool("watch", False, "Reprint until everything has ended, or Ctrl-C.")
WATCH_SECONDS = 30.0
UNFINISHED = (PENDING, STARTING, RUNNING, PREEMPTED)


def main(overrides: list[str]) -> int:
  signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends this without a traceback
  if _CONFIG.value is None and overrides:
    raise FieldError(overrides[0].removeprefix("--").partition("=")[0],
                     overrides[0].partition("=")[2], "needs --config=FILE")
  rows = _print(overrides)
  while _WATCH.value and (any(row.state in UNFINISHED for row in rows) or _driven(rows)):
    time.sleep(WATCH_SECONDS)
    print(flush=True)
    rows = _print(overrides)
  return 0


def _print(overrides: list[str]) -> list[CellState]:
  with reaching(_OUT.value):
    rows = (states_under(_OUT.value) if _CONFIG.value is None else
            states_of(_OUT.value, cli.selected_cells(_CONFIG.value, overrides)))
  if _JSON.value:
    print(json.dumps([dataclasses.asdict(row) for row in rows], indent=2), flush=True)
    return rows
  print("\n".join([*table(rows), counts(rows), *_slices(rows)]), flush=True)
  return rows


def _driven(rows: Sequence[CellState]) -> bool:
  """Whether slices are at work, which resume runs whose machines were preempted."""
  return any(one.record.state not in slices.FINAL and not one.progress().ended
             for experiment in {row.experiment for row in rows}
             for one in driver.read_all(epath.Path(_OUT.value) / experiment / "_slices"))


def _slices(rows: Sequence[CellState]) -> list[str]:
  """Returns lines on the experiments' slices in the cloud; empty if there are none."""
  lines = []
  for experiment in dict.fromkeys(row.experiment for row in rows):
    folder = epath.Path(_OUT.value) / experiment / "_slices"
    found = driver.read_all(folder)
    lines += [*(driver.table(found) if found else []), *budget.account(folder)]
  return lines


if __name__ == "__main__":
  cli.run(main)
