"""Runs the agent on a machine of a slice.

    python -m launch.host --work=OUT/EXPERIMENT/_slices/NAME/work.json
"""

import os
import sys

from absl import flags
from etils import epath

from launch import work
from launch.host import machine
from launch.host.agent import Agent, Pace
from moe_jax import cli
from moe_jax.errors import require

_WORK = flags.DEFINE_string("work", None, "The slice's work.json.", required=True)
_POLL = flags.DEFINE_float("poll_seconds", Pace.poll, "Polling interval.")
_RETRY = flags.DEFINE_float("retry_seconds", Pace.retry, "Pause between attempts.")
_HANG = flags.DEFINE_float("hang_seconds", Pace.hang, "Kill a run that makes no step for this "
                           "long; counts as a failure.")


def main(_: list[str]) -> int:
  path = epath.Path(_WORK.value)
  require(path.exists(), "work", _WORK.value, "no such file")
  todo = work.from_text(path.read_text(), path)
  try:
    worker = machine.worker_number(todo.hosts, os.environ)
    pace = Pace(_POLL.value, _RETRY.value, _HANG.value)
    return Agent(todo, path.parent, worker, pace, machine.life(os.environ)).run()
  except RuntimeError as error:
    print(f"error: {error}", file=sys.stderr, flush=True)
    return 1


if __name__ == "__main__":
  cli.run(main)
