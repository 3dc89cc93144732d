"""Compares planned step times with measured ones: estimate over measurement.

    python -m moe_jax.plan.calibrate
    python -m moe_jax.plan.calibrate --run=runs/reference/l16-d1024-f512-e64-k8 --topology=v5p-64

Without flags it compiles configurations for which others have published a speed; with --run, a
finished run of this project, on the slice where it was measured. A ratio below 1 is the fraction of
a real step that the plan accounts for: divide a plan's time by it.
"""

import json
import pathlib

from absl import flags

from moe_jax import cli
from moe_jax.errors import require

_RUN = flags.DEFINE_string("run", None, "Directory of a finished run to use instead of "
                           "published speeds.")
_TOPOLOGY = flags.DEFINE_string("topology", None, "TPU slice on which --run was measured.")
_SLICES = flags.DEFINE_integer("slices", 1, "Equal slices.")
_OUT = flags.DEFINE_string("out", "runs", "Directory of all experiments; plans are cached in it.")
_JSON = flags.DEFINE_string("json", None, "Writes the figures to this JSON file.")


def main(overrides: list[str]) -> int:
  from moe_jax.plan import calibration
  cli.no_overrides(overrides)
  require((_RUN.value is None) == (_TOPOLOGY.value is None), "topology", _TOPOLOGY.value,
          "must be given together with --run: the slice on which it was measured")
  cli.require_file("json", _JSON.value)
  points = calibration.PUBLISHED if _RUN.value is None else [
      calibration.of_run(_RUN.value, _TOPOLOGY.value, _SLICES.value)]
  rows = calibration.compare(points, _OUT.value)
  for row in rows:
    if row["estimated_seconds"] is not None:
      print("{name}, {topology}: estimated {estimated_seconds:.3f} s, measured "
            "{measured_seconds:.3f} s: estimate / measurement {ratio:.2f}; MFU {estimated_mfu:.1%} "
            "and {measured_mfu:.1%}. {source}.".format(**row))
  if _JSON.value:
    pathlib.Path(_JSON.value).write_text(json.dumps(rows, indent=1) + "\n")
  return 0 if all(row["estimated_seconds"] is not None for row in rows) else 1


if __name__ == "__main__":
  cli.run(main)
