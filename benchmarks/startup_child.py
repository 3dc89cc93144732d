"""Child of benchmarks.startup: runs the trainer, reports its stages and exits after a step."""

import json
import os
import sys
import time

from moe_jax.memory import use_huge_pages

STAGES = ("import", "data", "state", "compile", "first step")


def main(started: float) -> None:
  """Trains by the command line's flags; prints the seconds of each stage.

  Args:
    started: time.time() when the process was started.
  """
  from moe_jax import cli
  from moe_jax.train import __main__ as trainer
  from moe_jax.train import loop
  ended = {"import": time.time()}

  def timed(owner, name, stage):
    function = getattr(owner, name)

    def run(*args, **kwargs):
      result = function(*args, **kwargs)
      ended[stage] = time.time()
      return result

    setattr(owner, name, run)

  timed(loop, "_fitting", "data")
  timed(loop.Member, "begin", "state")
  timed(loop.Population, "__init__", "compile")
  step = loop.Population.step

  def first_step(*args):
    loop.jax.block_until_ready(step(*args))
    ended["first step"] = time.time()
    ends = [started, *(ended[stage] for stage in STAGES)]
    print("\n" + json.dumps(dict(zip(STAGES, (
        after - before for before, after in zip(ends, ends[1:], strict=False)), strict=True))),
        flush=True)
    os._exit(0)

  loop.Population.step = first_step
  cli.run(trainer.main)


if __name__ == "__main__":
  use_huge_pages()  # as the trainer does
  main(float(sys.argv.pop(1)))
