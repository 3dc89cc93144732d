"""Compiles every cell of a grid for a TPU slice, which does not have to be attached.

    python -m moe_jax.plan --config=experiments/reference.py --topology=v5p-64

Needs libtpu beside JAX (`pip install 'jax[tpu]'`) but no TPU. Execution flags set the layout, e.g.
--config.execution.mesh.expert=8 --config.execution.mesh.fsdp=4.
"""

import json
import math
import signal

from absl import flags

from moe_jax import cli
from moe_jax.errors import FieldError, require
from moe_jax.files import csv_text

_CONFIG = cli.define_config_flag()
_TOPOLOGY = flags.DEFINE_string(
    "topology", None, "TPU slice by its gcloud name: v4-*, v5litepod-*, v5p-*, v6e-*, tpu7x-*.",
    required=True)
_SLICES = flags.DEFINE_integer("slices", 1, "Number of equal slices.")
_OUT = flags.DEFINE_string("out", "runs", "Directory of all experiments; plans are cached in it.")
_PARALLEL = flags.DEFINE_integer("parallel", 1, "Concurrent compilations; each takes gigabytes.")
_PRICE = flags.DEFINE_float("usd_per_chip_hour", None, "Overrides the price per chip-hour.")
_JSON = flags.DEFINE_string("json", None, "Writes all results to this JSON file.")
_CSV = flags.DEFINE_string("csv", None, "Writes one row per cell to this CSV file.")
_SEARCH = flags.DEFINE_bool("search", False, "Look for the mesh, remat and microbatches under "
                            "which each cell is fastest, instead of planning its own.")
_TRIES = flags.DEFINE_integer("tries", 4, "Number of layouts per cell that --search compiles.")
_MEMORY = flags.DEFINE_bool("memory_profile", False, "Lists each cell's largest buffers at peak "
                            "memory, by source line.")
_HLO_OUT = flags.DEFINE_string("hlo_out", None, "Folder for the compiled HLO of each cell.")

_FEW = 8  # print collectives for at most this many cells; --csv always has them


def main(overrides: list[str]) -> int:
  from moe_jax.plan import topology as topology_lib
  topology = topology_lib.parse(_TOPOLOGY.value, _SLICES.value)
  for flag in (_PARALLEL, _TRIES):
    require(flag.value >= 1, flag.name, flag.value, "must be at least 1")
  price = topology.hardware.usd_per_chip_hour if _PRICE.value is None else _PRICE.value
  if price is not None and not (math.isfinite(price) and price >= 0):
    raise FieldError("usd_per_chip_hour", price, "must be a finite number, 0 or more")
  for flag in (_CSV, _JSON):
    cli.require_file(flag.name, flag.value)
  cells = cli.selected_cells(_CONFIG.value, overrides)
  # Worker processes would outlive this one: treat SIGTERM as Ctrl-C, on which they are killed.
  signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))

  import functools
  import pathlib

  import rich.console
  import rich.measure

  from moe_jax.plan import cells as cells_lib
  from moe_jax.plan import search, table
  plan_cells = functools.partial(
      cells_lib.plan_cells, topology=topology, out=_OUT.value, parallel=_PARALLEL.value,
      remedies=not _SEARCH.value, hlo_out=_HLO_OUT.value,
      say=lambda line: print(line, flush=True))
  if _SEARCH.value:
    plans, chosen, verdicts = search.recommend(cells, topology, _TRIES.value, plan_cells)
  else:
    plans = chosen = plan_cells(cells)
    verdicts = ""
  shown = table.table(plans, price)
  console = rich.console.Console()
  console.width = max(console.width, rich.measure.Measurement.get(
      console, console.options.update(max_width=10_000), shown).maximum)
  console.print(shown)
  if _MEMORY.value:
    for plan in plans:
      print(table.memory_profile(plan))
  if verdicts:
    print(verdicts)
  if len(plans) <= _FEW:
    console.print(table.collectives(plans))
  rows = [table.row(plan, price) for plan in plans]
  if not _SEARCH.value and (sizes := table.by_size(rows)):
    console.print(sizes)
  print(table.summary(chosen, price))
  if _CSV.value:
    pathlib.Path(_CSV.value).write_text(csv_text(rows))
  if _JSON.value:
    detailed = [flat | {name: plan.result.get(name, []) for name in ("dearest", "largest")}
                for flat, plan in zip(rows, plans, strict=True)]
    pathlib.Path(_JSON.value).write_text(json.dumps(detailed, indent=1))
  return 0 if all(plan.fits for plan in chosen) else 1


if __name__ == "__main__":
  cli.run(main)
