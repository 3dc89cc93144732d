"""Prints how every cell stands.

    python -m launch.status --config=experiments/quickstart.py    a row for each of its cells
    python -m launch.status                                       every run under --out

`--json` prints the same rows as a list of objects.
"""

import dataclasses
import json
import signal

from absl import flags

from launch.state import states_of, states_under
from launch.table import counts, table
from moe_jax import cli
from moe_jax.errors import FieldError

_CONFIG = cli.define_config_flag(required=False)
_OUT = flags.DEFINE_string("out", "runs", "Root of the run directories.")
_JSON = flags.DEFINE_bool("json", False, "Print JSON.")


def main(overrides: list[str]) -> int:
  signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends this without a traceback
  if _CONFIG.value is None:
    if overrides:
      raise FieldError(overrides[0].removeprefix("--").partition("=")[0],
                       overrides[0].partition("=")[2], "needs --config=FILE")
    rows = states_under(_OUT.value)
  else:
    rows = states_of(_OUT.value, cli.selected_cells(_CONFIG.value, overrides))
  if _JSON.value:
    print(json.dumps([dataclasses.asdict(row) for row in rows], indent=2))
  else:
    print("\n".join([*table(rows), counts(rows)]))
  return 0


if __name__ == "__main__":
  cli.run(main)
