"""Checks that a run killed at random moments resumes bitwise identically.

    python -m benchmarks.resume_soak --kills=100

A tiny model is trained twice: once undisturbed, and once repeatedly killed by SIGKILL and restarted
from whatever the kill left. The kills come at random moments: during startup of the process or a
little later (`start`), while a checkpoint is written (`save`), or between checkpoints (`train`).

After each kill, the newest checkpoint (parameters, moments, step, data position) and all metrics on
disk must be bitwise equal to those of the undisturbed run; a resume counts as bitwise if this holds
when the resumed process has ended. In the end the whole curve and the final state are compared.
Prints a table, then the same figures as JSON; exits with 1 unless every kill took place and every
resume was bitwise.

Processes are forked from one that has imported everything and compiled programs are cached, so a
start costs only JAX's own initialization.
"""

import collections
import dataclasses
import json
import multiprocessing
import os
import pathlib
import random
import sys
import tempfile
import time
from typing import Any

import jax
import numpy as np
from absl import flags, logging
from rich import box, console, table

from moe_jax import cli
from moe_jax.config import Architecture, ExecutionConfig, RunConfig
from moe_jax.errors import require
from moe_jax.fields import override
from moe_jax.grid import Cell
from moe_jax.mesh import make_mesh
from moe_jax.run_dir import FINISHED, RunDir
from moe_jax.train.checkpoint import restore_step
from moe_jax.train.checkpoint_files import checkpoint_steps
from moe_jax.train.checkpoint_format import CheckpointError
from moe_jax.train.loop import train
from moe_jax.train.step import abstract_state

_KILLS = flags.DEFINE_integer("kills", 100, "How many.")
_SEED = flags.DEFINE_integer("seed", 0, "Random seed of the moments.")
_OUT = flags.DEFINE_string("out", None, "Folder for the runs; by default a temporary one.")

STEPS_A_KILL, EVERY = 50, 10  # attempts survive fewer than STEPS_A_KILL steps on average
MOMENTS = ("start", "save", "train")
_POLL_SECONDS = 0.002
_CLOCKS = ("tokens_per_second", "mfu")
_PROCESSES = multiprocessing.get_context("forkserver")


def make_cell(name: str, n_kills: int, keep: int) -> Cell:
  config = override(RunConfig(
      arch=Architecture(n_layers=1, d_model=16, d_expert=8, n_exp=4, n_topk=2, n_heads=2),
      execution=ExecutionConfig(log_every=1, checkpoint_every=EVERY, keep_checkpoints=keep)), {
          "model.compute_dtype": "float32", "data.seq_len": 16, "train.batch_size": 8,
          "train.steps": STEPS_A_KILL * n_kills, "train.warmup_steps": 10})
  return Cell("soak", "", name, config)


def _train(cell: Cell, out: pathlib.Path) -> None:
  """The child process: trains like `python -m moe_jax.train`, with its output in a file."""
  with open(out / f"{cell.name}.log", "ab", buffering=0) as log:
    os.dup2(log.fileno(), sys.stdout.fileno())
    os.dup2(log.fileno(), sys.stderr.fileno())
  logging.set_verbosity(logging.WARNING)
  sys.exit(train(cell, out))


def start(cell: Cell, out: pathlib.Path) -> multiprocessing.Process:
  process = _PROCESSES.Process(target=_train, args=(cell, out))
  process.start()
  return process


class Reference:
  """The undisturbed run, with the metrics of every step and all its checkpoints."""

  def __init__(self, cell: Cell, out: pathlib.Path):
    self.cell, self.run_dir = cell, RunDir.of(out, cell)
    self._wanted = abstract_state(cell.config, make_mesh(cell.config))
    self._curve = _curve(self.run_dir)

  def is_whole(self) -> bool:
    steps = self.cell.config.train.steps
    return [record["step"] for record in self._curve] == list(range(1, steps + 1))

  def difference(self, run_dir: RunDir) -> str | None:
    """Describes where a run's files differ from this one's; None if nowhere."""
    for record in _curve(run_dir):
      if record != self._curve[record["step"] - 1]:
        return f"the metrics of step {record['step']}"
    steps = checkpoint_steps(run_dir)
    if not steps:
      return None
    try:
      ours, theirs = (restore_step(each, steps[-1], self._wanted)
                      for each in (run_dir, self.run_dir))
    except CheckpointError as error:
      return str(error)
    same = ours.data == theirs.data and all(
        np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in zip(
            jax.tree.leaves(ours.state), jax.tree.leaves(theirs.state), strict=True))
    return None if same else f"the checkpoint of step {steps[-1]}"


def _curve(run_dir: RunDir) -> list[dict[str, Any]]:
  return [{name: value for name, value in record.items() if name not in _CLOCKS}
          for record in run_dir.read_metrics()]


@dataclasses.dataclass(frozen=True)
class Kill:
  """One SIGKILL and the state it left on disk.

  Attributes:
    moment: one of MOMENTS.
    step: step of the newest checkpoint; 0 without one.
    half_written: whether it left an unfinished checkpoint.
    difference: where the run differs from the undisturbed one; None if nowhere.
  """

  moment: str
  step: int
  half_written: bool
  difference: str | None


def kill_once(cell: Cell, out: pathlib.Path, moment: str, rng: random.Random,
              start_seconds: float, reference: Reference) -> Kill | None:
  """Starts the run and kills it; returns None if it finished first."""
  run_dir = RunDir.of(out, cell)
  folder = pathlib.Path(run_dir.checkpoints)
  before = set(folder.glob("[0-9]*"))
  process = start(cell, out)
  pattern = "*.orbax-checkpoint-tmp*" if moment == "save" else "[0-9]*"
  seen, wanted = set(before), rng.randint(1, 3)
  deadline = time.monotonic() + (rng.uniform(0, 1.2 * start_seconds) if moment == "start"
                                 else float("inf"))
  while process.is_alive() and len(seen - before) < wanted and time.monotonic() < deadline:
    seen |= {path for path in folder.glob(pattern)
             if moment == "save" or path.name.isdecimal()}
    time.sleep(_POLL_SECONDS)
  if moment != "start":
    time.sleep(rng.uniform(0, 0.1))
  if not process.is_alive() and run_dir.read_status().get("state") == FINISHED:
    return None
  process.kill()
  process.join()
  return Kill(moment, (checkpoint_steps(run_dir) or [0])[-1],
              any(folder.glob("*.orbax-checkpoint-tmp*")), reference.difference(run_dir))


def soak(out: pathlib.Path, n_kills: int, seed: int) -> dict[str, Any]:
  """Runs the whole experiment; returns the figures."""
  _PROCESSES.set_forkserver_preload([train.__module__])
  undisturbed = make_cell("undisturbed", n_kills, keep=STEPS_A_KILL * n_kills // EVERY + 1)
  process = start(undisturbed, out)  # this also prepares the data and fills the compilation cache
  process.join()
  require(process.exitcode == 0, "out", str(out), f"the undisturbed run failed: see "
          f"{undisturbed.name}.log there")
  reference = Reference(undisturbed, out)
  assert reference.is_whole()

  rng, cell = random.Random(seed), make_cell("killed", n_kills, keep=2)
  start_seconds = _start_seconds(out, n_kills)
  kills: list[Kill] = []
  began = time.monotonic()
  for number in range(n_kills):
    found = kill_once(cell, out, rng.choice(MOMENTS), rng, start_seconds, reference)
    if found is None:
      break
    kills.append(found)
    if found.difference:
      print(f"kill {number + 1}: {found.difference} differs", flush=True)
  seconds = time.monotonic() - began
  process = start(cell, out)
  process.join()
  run_dir = RunDir.of(out, cell)
  end = ("the run did not finish" if run_dir.read_status().get("state") != FINISHED
         or len(_curve(run_dir)) != cell.config.train.steps else reference.difference(run_dir))
  after = [kill.difference for kill in kills[1:]] + [end]  # the state after each resume
  return {
      "kills": len(kills), "bitwise_resumes": sum(difference is None for difference in after),
      "end_differs_in": end, "steps": cell.config.train.steps,
      "attempts_with_metrics": run_dir.next_attempt() - 1, "seconds": round(seconds, 1),
      "seconds_of_a_start": round(start_seconds, 2), "device": jax.devices()[0].device_kind,
      "by_moment": {moment: {
          "kills": sum(kill.moment == moment for kill in kills),
          "left_a_checkpoint_half_written": sum(kill.half_written for kill in kills
                                                if kill.moment == moment),
          "bitwise_resumes": sum(difference is None for kill, difference in
                                 zip(kills, after, strict=True) if kill.moment == moment)}
                    for moment in MOMENTS},
      "checkpoints_gone_on_from": len(collections.Counter(kill.step for kill in kills))}


def _start_seconds(out: pathlib.Path, n_kills: int) -> float:
  """Seconds from the start of a process to its first checkpoint, with warm caches."""
  cell = make_cell("start", n_kills, keep=1)
  began = time.monotonic()
  process = start(cell, out)
  while process.is_alive() and not RunDir.of(out, cell).has_checkpoint():
    time.sleep(_POLL_SECONDS)
  took = time.monotonic() - began
  process.kill()
  process.join()
  return took


def main(overrides: list[str]) -> int:
  cli.no_overrides(overrides)
  require(_KILLS.value >= 1, "kills", _KILLS.value, "must be at least 1")
  logging.set_verbosity(logging.ERROR)
  with tempfile.TemporaryDirectory() as folder:
    out = pathlib.Path(_OUT.value or folder).absolute()
    out.mkdir(parents=True, exist_ok=True)
    figures = soak(out, _KILLS.value, _SEED.value)
  view = table.Table(box=box.SIMPLE, title=f"{figures['kills']} kills in {figures['steps']} steps")
  for column in ("moment", "kills", "left a checkpoint half-written", "bitwise resumes"):
    view.add_column(column, justify="left" if column == "moment" else "right")
  for moment, row in figures["by_moment"].items():
    view.add_row(moment, *map(str, row.values()))
  console.Console(width=100).print(view)
  print(json.dumps(figures, indent=2))
  if figures["kills"] < _KILLS.value:
    print(f"the run was finished after {figures['kills']} kills", file=sys.stderr)
  return 0 if figures["bitwise_resumes"] == figures["kills"] == _KILLS.value else 1


if __name__ == "__main__":
  cli.run(main)
