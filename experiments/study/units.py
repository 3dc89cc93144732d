"""Schedules the units of a sitting (cells of one shape), several of them concurrently."""

import dataclasses
import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from moe_jax.cluster import share_of_memory
from moe_jax.errors import FieldError
from moe_jax.grid import Cell
from moe_jax.population import shape_of
from moe_jax.run_dir import DIVERGED, RunDir
from moe_jax.study import kept
from moe_jax.study.candidates import flops

TO_SAVE_SECONDS = 20.0  # grace period for trainers to checkpoint when the time is up
_POLL_SECONDS = 0.2
_PACKED_CHARACTERS = 8_000  # of a failed unit's output
# Runs a command so that the kernel sends it SIGTERM when the sitting dies: a trainer that outlived
# a killed sitting would hold on to its run and the device. 1 is PR_SET_PDEATHSIG. The first
# argument is the sitting's PID, to detect that the sitting died before prctl took effect.
_ENDS_WITH_US = ("import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 15); "
                 "os.getppid() == int(sys.argv[1]) or sys.exit('the sitting has exited'); "
                 "os.execvp(sys.argv[2], sys.argv[2:])")


@dataclasses.dataclass
class Unit:
  """Cells of one shape, and the process that trains or evaluates them."""

  name: str
  cells: tuple[Cell, ...]
  stage: str = "train"
  overrides: tuple[str, ...] = ()
  process: subprocess.Popen | None = None
  began: float = 0.0
  log_from: int = 0  # offset in the log file at which the current process starts writing
  retried: bool = False
  resumes: bool = False  # whether an earlier sitting started it

  @property
  def flops(self) -> float:
    """Training FLOPs of its runs; for a branch, only those after it leaves its trunk."""
    return sum(flops(cell.config) * (1 - (cell.config.train.branch_step or 0)
                                     / cell.config.train.steps) for cell in self.cells)

  def log(self, out: str) -> pathlib.Path:
    return pathlib.Path(out) / "_sitting" / f"{self.cells[0].experiment}-{self.name}.txt"


def units_of(cells: Sequence[Cell], is_done: Callable[[Cell], bool]) -> list[Unit]:
  """Groups the cells that are not done into units, in order; a trunk only if a branch needs it."""
  trunks = {cell.config.train.branch_run for cell in cells}
  alike: dict[tuple, list[Cell]] = {}
  for cell in cells:
    alike.setdefault((cell.experiment, shape_of(cell.config)), []).append(cell)
  found = []
  for group in alike.values():
    todo = [cell for cell in group if cell.name not in trunks and not is_done(cell)]
    needed = {cell.config.train.branch_run for cell in todo}
    if todo:
      found.append(Unit(todo[-1].name, tuple(
          cell for cell in group if cell in todo or cell.name in needed)))
  return found


def is_done(cell: Cell, *roots: str) -> bool:
  """Whether, under any of the roots, a cell was evaluated or diverged, or its trunk diverged first.

  Prints the error of a run that is damaged or has another identity.
  """
  for root in roots:
    run = RunDir.of(root, cell)
    try:
      if run.check_identity(cell) and (kept.progress(run) == kept.EVALUATED
                                       or run.read_status().get("state") == DIVERGED):
        return True
      if kept.lost_trunk(run, cell.config) is not None:
        return True
    except FieldError as error:
      print(f"{cell.name}: {error}", flush=True)
  return False


def is_trained(cell: Cell, root: str) -> bool:
  """Whether a cell's training is finished under a root; prints the error of a damaged run."""
  try:
    return kept.progress(RunDir.of(root, cell)) >= kept.FINISHED
  except FieldError as error:
    print(f"{cell.name}: {error}", flush=True)
    return False


def command_of(unit: Unit, out: str, population: int) -> list[str]:
  """Returns the command that trains or evaluates a unit; trunks are not evaluated."""
  spec, wanted = unit.cells[0].selector.rpartition(":")[0], unit.cells
  if unit.stage == "evaluate":
    trunks = {cell.config.train.branch_run for cell in unit.cells}
    wanted = [cell for cell in unit.cells if cell.name not in trunks]
  names = ",".join(cell.selector.rpartition(":")[2] for cell in wanted)
  return [sys.executable, "-m", f"moe_jax.{unit.stage}", f"--config={spec}:{names}",
          f"--out={out}", f"--config.execution.population={population}", *unit.overrides]


class Sitting:
  """One sitting's units: waiting, running, done and failed."""

  def __init__(self, units: Sequence[Unit], out: str, parallel: int, population: int,
               deadline: float, keep: Callable[[], None] = lambda: None):
    """`keep` is called whenever a unit is done; `deadline` is on the clock of time.monotonic()."""
    for unit in units:
      unit.resumes = any(RunDir.of(out, cell).has_checkpoint() for cell in unit.cells)
    self._waiting, self._working = sorted(units, key=lambda unit: not unit.resumes), []
    self._out, self._parallel, self._population = out, parallel, population
    self._deadline, self._keep = deadline, keep
    self._seconds = self._read_seconds()
    self.done: list[Unit] = []
    self.failed: list[str] = []
    self.logs: list[str] = []  # the ends of the failed units' logs

  def run(self) -> None:
    """Runs until all units are done or the time is up."""
    try:
      while self._working or self._waiting:
        self._reap()
        if time.monotonic() >= self._deadline:
          break
        if len(self._working) < self._parallel and (unit := self._next()) is not None:
          self._start(unit)
          continue
        if not self._working:  # no waiting unit fits
          break
        time.sleep(_POLL_SECONDS)
    finally:
      self._stop()

  def end(self) -> None:
    """Sets the deadline to now, so that running units checkpoint; safe in a signal handler."""
    self._deadline = time.monotonic()

  def expected(self, unit: Unit) -> float:
    """Expected seconds, from the finished unit nearest in FLOPs; 0 if there is none."""
    if not self._seconds:
      return 0.0
    ours = unit.flops
    its, seconds = min(self._seconds, key=lambda known: abs(known[0] - ours))
    return seconds * max(1.0, ours / its)

  def _next(self) -> Unit | None:
    """Pops a unit that resumes or should finish in time, or any if the device would be idle."""
    left = self._deadline - time.monotonic()
    found = [unit for unit in self._waiting if unit.resumes or self.expected(unit) <= left]
    if not found and not self._working:
      found = self._waiting
    if not found:
      return None
    unit = found[0]
    self._waiting.remove(unit)
    return unit

  def _start(self, unit: Unit) -> None:
    unit.began = unit.began or time.monotonic()
    command = command_of(unit, self._out, self._population)
    ours = ([sys.executable, "-c", _ENDS_WITH_US, str(os.getpid())]
            if sys.platform == "linux" else [])
    environment = share_of_memory(os.environ, self._parallel)
    log = unit.log(self._out)
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as file:
      file.write(f"==== {shlex.join(command)}\n".encode())
      file.flush()
      unit.log_from = file.tell()
      unit.process = subprocess.Popen([*ours, *command], stdin=subprocess.DEVNULL, stdout=file,
                                      stderr=subprocess.STDOUT, env=environment,
                                      start_new_session=True)
    self._working.append(unit)

  def _reap(self) -> None:
    for unit in list(self._working):
      code = unit.process.poll()
      if code is None:
        continue
      self._working.remove(unit)
      if code and self._out_of_memory(unit):
        unit.retried = True
        unit.overrides += ("--config.execution.population=1", "--config.execution.remat=full")
        print(f"{unit.name}: out of memory; retrying with one run at a time", flush=True)
        self._start(unit)
      elif unit.stage == "train" and any(is_trained(cell, self._out) for cell in unit.cells
                                         if cell.config.train.decay_fraction):
        unit.stage = "evaluate"
        self._start(unit)
      else:
        self._end(unit, code)

  def _out_of_memory(self, unit: Unit) -> bool:
    return unit.stage == "train" and not unit.retried and (
        "RESOURCE_EXHAUSTED" in self._said(unit, 20_000))

  def _said(self, unit: Unit, length: int) -> str:
    """Returns the end of the output of the unit's latest process."""
    return unit.log(self._out).read_bytes()[unit.log_from:][-length:].decode(errors="replace")

  def _end(self, unit: Unit, code: int) -> None:
    seconds = time.monotonic() - unit.began
    left = [cell.name for cell in unit.cells if cell.config.train.decay_fraction
            and not is_done(cell, self._out)]
    if left:
      lines = self._said(unit, 4_000).strip().splitlines()
      # Of all its processes: the training of some cells may have failed before the evaluation did.
      self.logs.append(unit.log(self._out).read_text(errors="replace")[-_PACKED_CHARACTERS:])
      self.failed.append(f"{unit.name}: {unit.stage} ended with code {code}: "
                         f"{lines[-1] if lines else 'no output'}")
      print(self.failed[-1], flush=True)
      return
    self.done.append(unit)
    self._seconds.append((unit.flops, seconds))
    self._seconds_file.write_text(json.dumps(self._seconds))
    print(f"{unit.name}: {len(unit.cells)} runs, {seconds:.0f} s", flush=True)
    self._keep()

  def _stop(self) -> None:
    for unit in self._working:
      unit.process.send_signal(signal.SIGTERM)
    until = time.monotonic() + TO_SAVE_SECONDS
    for unit in self._working:
      try:
        unit.process.wait(max(0.1, until - time.monotonic()))
      except subprocess.TimeoutExpired:
        os.killpg(unit.process.pid, signal.SIGKILL)
        unit.process.wait()
      print(f"{unit.name}: stopped while it was to {unit.stage}", flush=True)

  @property
  def _seconds_file(self) -> pathlib.Path:
    return pathlib.Path(self._out) / "_sitting" / "seconds.json"

  def _read_seconds(self) -> list[tuple[float, float]]:
    try:
      return [tuple(pair) for pair in json.loads(self._seconds_file.read_text())]
    except (OSError, ValueError):
      return []

  @property
  def left(self) -> list[Unit]:
    return [*self._working, *self._waiting]


def summary(sitting: Sitting, seconds: float) -> list[str]:
  """Returns lines on what was done, how fast, and what is left."""
  work, left = (sum(unit.flops for unit in units) for units in (sitting.done, sitting.left))
  lines = [f"{len(sitting.done)} units done, {len(sitting.left)} left, {len(sitting.failed)} "
           f"failed, in {seconds:.0f} s"]
  if sitting.done:
    speed = work / seconds
    lines.append(f"{speed:.3g} FLOP/s overall; what is left ({left:.3g} FLOPs) takes about "
                 f"{left / speed / 60:.0f} minutes at that rate")
  return [*lines, *sitting.failed]
