"""Copies an experiment's results to a local folder: all but checkpoints, logs and traces.

    python -m launch.collect --out=gs://BUCKET/runs --experiment=NAME --to=runs

Metrics files that have not grown since the last copy are skipped. results.csv is rebuilt from the
local copies.
"""

import pathlib

from absl import flags
from etils import epath

from launch import submitted
from moe_jax import cli
from moe_jax.errors import require
from moe_jax.evaluate import results
from moe_jax.files import reaching

_OUT, _EXPERIMENT = submitted.define_flags()
_TO = flags.DEFINE_string("to", "runs", "Local folder to copy to, usable as --out.")


def main(overrides: list[str]) -> int:
  del overrides
  source = epath.Path(_OUT.value) / _EXPERIMENT.value
  with reaching(_OUT.value):
    require(source.exists(), "experiment", _EXPERIMENT.value,
            f"is not under --out={_OUT.value}")
  target = pathlib.Path(_TO.value) / _EXPERIMENT.value
  require(target.resolve() != pathlib.Path(source).resolve(), "to", _TO.value,
          "must be a different folder from --out")
  with reaching(_OUT.value):
    copied, same = submitted.copy_home(source, target)
  rows, _ = results.collect(_TO.value, _EXPERIMENT.value)
  if rows:
    results.write_csv(results.csv_path(_TO.value, _EXPERIMENT.value), rows)
  print(f"copied {copied} files to {target}, skipped {same} unchanged; {len(rows)} rows in "
        "results.csv")
  return 0


if __name__ == "__main__":
  cli.run(main)
