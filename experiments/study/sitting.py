"""Trains the study's remaining runs on one device for a limited time, and packs the results.

    python -m experiments.study.sitting --grids=pilots --minutes=60 --pack=packed
    python -m experiments.study.keep --out=packed/results-1.zip

For time-limited or preemptible machines: it packs after every unit, and SIGTERM or Ctrl-C has the
same effect as reaching the time limit, checkpointing and packing included. Runs already archived
in experiments/study/results are skipped. Cells of one shape form a unit: one process trains them,
up to --population at a time, and another evaluates them; up to --parallel units run concurrently.
On the same machine, the next sitting resumes where this one stopped. Only finished runs are
carried to another machine, because a checkpoint is larger than the whole record of a run; so a
unit that would not finish in time is not started unless the device would otherwise be idle.

--config.execution.PATH=VALUE is passed on. A unit that runs out of memory in training is retried
once, one run at a time with --config.execution.remat=full.
"""

import contextlib
import functools
import os
import pathlib
import shutil
import signal
import time
from collections.abc import Callable, Mapping
from typing import Any

from absl import flags
from etils import epath

from experiments.study import plan
from experiments.study.units import TO_SAVE_SECONDS, Sitting, is_done, summary, units_of
from moe_jax import cli
from moe_jax.errors import FieldError, require
from moe_jax.files import write_text
from moe_jax.grid import Grid
from moe_jax.study import kept

_NAMES = (*plan.GRIDS, *plan.REHEARSALS)
_GRIDS = flags.DEFINE_list("grids", ["pilots"], "Grids of this folder, in the order in which they "
                           f"run: {', '.join(_NAMES)}.")
_OUT = flags.DEFINE_string("out", "runs", "Root of the run directories.")
_KEPT = flags.DEFINE_string("kept", plan.RESULTS, "Folder with the records of earlier sittings.")
_MINUTES = flags.DEFINE_float("minutes", 60.0, "Time limit of the sitting, in minutes.",
                              lower_bound=0.2)
_PARALLEL = flags.DEFINE_integer("parallel", 3, "Number of units that run at a time; each gets its "
                                 "share of the device's memory.", lower_bound=1)
_POPULATION = flags.DEFINE_integer("population", 8, "Maximum number of runs of one shape that "
                                   "train together.", lower_bound=1)
_PACK = flags.DEFINE_string("pack", None, "Folder for results-1.zip and for sitting.txt: a "
                             "summary, and the last output of units that failed.")
_PART_MB = flags.DEFINE_float("part_mb", None, "Maximum size of a .zip in megabytes; further runs "
                              "go into further .zip files. Default: a single .zip.",
                              lower_bound=0.01)

_TO_PACK_SECONDS = 15.0


def main(overrides: list[str]) -> int:
  began = time.monotonic()
  require(any(_GRIDS.value), "grids", "", f"must be one of {', '.join(_NAMES)}")
  for name in _GRIDS.value:
    require(name in _NAMES, "grids", name, f"must be one of {', '.join(_NAMES)}")
  for override in overrides:
    if not override.startswith("--config.execution."):
      path, _, value = override.removeprefix("--").partition("=")
      raise FieldError(path, value, "changes what is trained: edit the grid's file instead")
  cells = [cell for name in _GRIDS.value
           for cell in cli.selected_cells(str(plan.FOLDER / f"{name}.py"), overrides)]
  units = units_of(cells, lambda cell: is_done(cell, _KEPT.value, _OUT.value))
  for unit in units:
    unit.overrides = tuple(overrides)
  print(f"{len(units)} units to do, {sum(unit.flops for unit in units):.3g} FLOPs", flush=True)
  packing = functools.partial(pack, _OUT.value, _PACK.value, plan.grids(), None
                              if _PART_MB.value is None else round(1e6 * _PART_MB.value))
  sitting = Sitting(units, _OUT.value, _PARALLEL.value, _POPULATION.value,
                    began + 60 * _MINUTES.value - TO_SAVE_SECONDS - _TO_PACK_SECONDS,
                    functools.partial(_try, packing) if _PACK.value is not None else lambda: None)
  signal.signal(signal.SIGTERM, lambda *_: sitting.end())  # preemption
  try:
    sitting.run()
  finally:
    lines = summary(sitting, time.monotonic() - began)
    print("\n".join(lines), flush=True)
    if _PACK.value is not None:
      write_text(epath.Path(_PACK.value) / "sitting.txt",
                 "\n".join([*lines, *sitting.logs]) + "\n")
      print("\n".join(f"{file}: {file.stat().st_size:,} bytes" for file in packing()), flush=True)
  return 1 if sitting.failed else 0


def pack(out: str, to: str, grids: Mapping[str, Grid],
         part_bytes: int | None) -> list[pathlib.Path]:
  """Packs the records of all runs under `out`, replacing earlier packs only once it is done.

  Raises:
    FieldError: a run is larger than `part_bytes`.
  """
  staging, aside = pathlib.Path(out) / "_sitting" / "kept", pathlib.Path(to) / ".partial"
  _, _, problems = kept.keep(out, staging, grids)
  print("\n".join(problems), end="\n" if problems else "", flush=True)
  made = [pathlib.Path(os.fspath(file)).replace(pathlib.Path(to) / file.name)
          for file in kept.pack(staging, aside, part_bytes)]
  shutil.rmtree(aside, ignore_errors=True)
  return made


def _try(packing: Callable[[], Any]) -> None:
  """Packs after a unit, ignoring failures: the final packing reports them."""
  with contextlib.suppress(FieldError, OSError):
    packing()


if __name__ == "__main__":
  cli.run(main)
