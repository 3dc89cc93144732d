"""A fake trainer without a model that keeps the trainer's contract with real files and signals.

    python trainer.py BEHAVIOR --config=FILE:CELL[,CELL...] --out=DIR [--config.PATH=VALUE ...]

Its checkpoint is a file with the step in it, saved every `execution.checkpoint_every` steps, and
a folder for each of `execution.keep_steps`.
BEHAVIOR is one of these, or a comma-separated list with one for each value of seed_init:

    ok          trains
    slow        trains, 50 ms a step
    crash       raises at step 7, always
    crawl       raises seven steps later in each attempt
    crash_once  raises at step 7 of the first attempt
    killed_once SIGKILLs itself at step 7 of the first attempt
    diverge     the loss is NaN at step 7
    broken      raises before it has written anything
    hang_once   hangs silently at step 7 of the first attempt
    deaf        trains slowly and ignores SIGTERM
    liar        exits with code 0 without training
"""

import contextlib
import math
import os
import signal
import sys
import time

from absl import flags

from moe_jax import cli
from moe_jax import run_dir as run_dir_lib
from moe_jax.files import write_json, write_text
from moe_jax.run_dir import RunDir

_CONFIG = cli.define_config_flag()
_OUT = flags.DEFINE_string("out", "runs", "")
_BEHAVIORS = sys.argv.pop(1).split(",")
_BAD_STEP = 7


def main(overrides):
  cells = cli.selected_cells(_CONFIG.value, overrides)
  behaviors = [_BEHAVIORS[cell.config.seed_init % len(_BEHAVIORS)] for cell in cells]
  if "broken" in behaviors:
    raise ImportError("no module named 'nonsense'")
  if "liar" in behaviors:
    return 0
  codes = []
  try:
    with contextlib.ExitStack() as held:
      run_dirs = [RunDir.of(_OUT.value, cell) for cell in cells]
      for run_dir, cell in zip(run_dirs, cells, strict=True):
        run_dir.claim(cell)
        held.enter_context(run_dir.lock())
      for run_dir, cell, behavior in zip(run_dirs, cells, behaviors, strict=True):
        codes.append(_train(run_dir, cell.config, behavior))
        if codes[-1] == run_dir_lib.EXIT_PREEMPTED:
          break
  except run_dir_lib.RunDirBusy as error:
    print(f"error: {error}", file=sys.stderr)
    return run_dir_lib.EXIT_BUSY
  return max(codes)


def _train(run_dir, config, behavior):
  told = []
  signal.signal(signal.SIGTERM, lambda *_: None if behavior == "deaf" else told.append(1))
  checkpoint = run_dir.path / "checkpoint"
  first = step = int(checkpoint.read_text()) if checkpoint.exists() else 0
  attempt = run_dir.next_attempt()
  write_text(run_dir.metrics_file(attempt, first), '{"step": ' + str(first) + '}\n')
  loss = None

  def say(state, error=None):
    run_dir.write_status({
        "state": state, "step": step, "steps": config.train.steps, "attempt": attempt,
        "loss": loss, "tokens_per_second": 1234.5, "error": error})

  say(run_dir_lib.RUNNING)
  while step < config.train.steps:
    if told:
      checkpoint.write_text(str(step))
      say(run_dir_lib.PREEMPTED)
      return run_dir_lib.EXIT_PREEMPTED
    time.sleep(0.05 if behavior in ("slow", "deaf") else 0.001)
    step, loss = step + 1, 5.0 / (step + 1)
    if step == _BAD_STEP and behavior == "diverge":
      loss = math.nan
      say(run_dir_lib.DIVERGED, "the loss is nan")
      return run_dir_lib.EXIT_DIVERGED
    say(run_dir_lib.RUNNING)
    if step == _BAD_STEP and behavior == "hang_once" and attempt == 1:
      time.sleep(600)
    if behavior == "crawl" and step == _BAD_STEP * attempt:
      raise RuntimeError("a little further")
    if step == _BAD_STEP and behavior in ("crash", "crash_once", "killed_once"):
      if behavior == "killed_once" and attempt == 1:
        os.kill(os.getpid(), signal.SIGKILL)
      if behavior == "crash" or attempt == 1:
        say(run_dir_lib.FAILED, "RuntimeError: step 7 is cursed")
        raise RuntimeError("step 7 is cursed")
    if step % config.execution.checkpoint_every == 0:
      checkpoint.write_text(str(step))
    if step in config.execution.keep_steps:
      (run_dir.checkpoints / str(step)).mkdir(parents=True, exist_ok=True)
  if config.execution.keep_steps:  # the last one is always kept
    (run_dir.checkpoints / str(step)).mkdir(parents=True, exist_ok=True)
    write_json(run_dir.checksums(step), {})
  say(run_dir_lib.FINISHED)
  return 0


if __name__ == "__main__":
  cli.run(main)
