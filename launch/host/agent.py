"""The agent, which runs on every machine of a slice and trains its cells one after another.

Cells that may train together (`execution.population`) share one process.

The leader (host 0 of slice 0) decides which cell is next and publishes it in now.json under a
sequence number, which the other hosts follow. So all hosts are always in the same attempt at the
same cell: when one fails, all are told to begin the next attempt. Numbers from an earlier life
(before SLURM or JobSet restarted all hosts) are ignored. Each host writes its heartbeat to a file
of its own.

When the cost of all slices is about to pass the limit, the leader ends as if all cells were done.

A cell's program may fail `max_failures` times; being stopped from outside does not count. Among
cells that train together, one that another process holds waits until the others have ended, and
each cell makes its last attempt alone, so that none fails for good because of another.
"""

import dataclasses
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any

from etils import epath

from launch import ends
from launch import jobs as jobs_lib
from launch.budget import Meter
from launch.host import machine
from launch.host.trainer import Trainer
from launch.jobs import Launch, read_launch, write_launch
from launch.work import HostWord, Work, read_host, why_ended
from moe_jax import run_dir as run_dir_lib
from moe_jax.cli import EXIT_BAD_INPUT
from moe_jax.errors import FieldError
from moe_jax.files import is_of_storage, read_json, write_json
from moe_jax.run_dir import RunDir

HANG_SECONDS = 1800.0  # without a step; a large model's first step compiles for minutes
HEARTBEAT_SECONDS = 30.0
_MAX_BUSY = 20  # in a row; a stale heartbeat takes two minutes to count as dead
_FINAL = {EXIT_BAD_INPUT: jobs_lib.REFUSED, run_dir_lib.EXIT_DIVERGED: run_dir_lib.DIVERGED}


class Stopped(Exception):
  """The machine is going away; the trainer was told to save."""


class Useless(Exception):
  """Nothing can be trained on these machines; the message says why in one line."""


@dataclasses.dataclass(frozen=True)
class Pace:
  """The agent's intervals and time limits in seconds; tests use shorter ones."""

  poll: float = 5.0
  retry: float = 15.0
  hang: float = HANG_SECONDS


class Agent:
  """Does one host's part of a slice's work."""

  def __init__(self, work: Work, folder: epath.Path, worker: str, pace: Pace = Pace(),
               life: str = "", trouble: Callable[[], str | None] = machine.trouble,
               clock: Callable[[], float] = time.monotonic):
    self._work, self._folder, self._worker, self._pace = work, folder, worker, pace
    self._life, self._trouble, self._clock = life, trouble, clock
    self._stopping = False
    self._said = 0.0
    self._meter: Meter | None = None  # only the leader has one
    self._environ: dict[str, str] = {}
    # (host, pid) -> (its latest heartbeat, when that arrived by our clock)
    self._heard: dict[tuple[str, int], tuple[float | None, float]] = {}
    self._busy: dict[str, int] = {}  # cell -> consecutive attempts that found it held

  def run(self) -> int:
    """Works until all cells have ended.

    Returns:
      The exit code: 0, EXIT_PREEMPTED when stopped, or 1 if nothing can be trained here.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
      signal.signal(number, lambda *_: setattr(self, "_stopping", True))
    self._say("starting")
    if trouble := self._trouble():
      self._say("dirty", trouble)
      print(f"this machine is unusable: {trouble}", flush=True)
      return 1
    self._environ = machine.read_secrets(self._work.secrets)
    self._environ["MOE_JAX_COMMIT"] = self._work.commit
    machine.say_at_work(os.environ)
    try:
      if self._worker == machine.LEADER:
        self._lead()
      else:
        self._follow()
    except Stopped:
      self._say("stopped")
      return run_dir_lib.EXIT_PREEMPTED
    except Useless as error:
      self._say("dirty", str(error))
      print(f"these machines are unusable: {error}", flush=True)
      return 1
    self._say("done")
    return 0

  # the leader

  def _lead(self) -> None:
    self._meter = Meter(self._folder, self._work.usd_per_second)
    too_dear = None
    for group in self._work.in_groups():
      while not too_dear and (
          names := [name for name in group if why_ended(self._work, name) is None]):
        self._gather()
        if too_dear := self._meter.why_too_dear():
          print(too_dear, flush=True)
        else:
          self._attempt(self._together(names))
      for name in group:
        print(f"{name}: {why_ended(self._work, name) or 'unfinished'}", flush=True)
    self._publish(())
    self._meter.count(ended=True)

  def _gather(self) -> None:
    """Waits until all hosts of the run are alive or the limit is reached. Raises Useless.

    Without this, a trainer that waits in vain for a late host would count as a program failure.
    """
    until = self._clock() + self._pace.hang
    while (there := self._alive()) < self._work.hosts and not self._meter.why_too_dear():
      if self._clock() > until:
        raise Useless(f"only {there} of {self._work.hosts} hosts reported within "
                      f"{self._pace.hang:.0f} s")
      self._beat(None)
      self._pause(self._pace.poll)

  def _alive(self) -> int:
    if self._work.hosts == 1:
      return 1
    words = [read_host(file) for file in self._folder.glob("host-*.json")]
    return sum(word is not None and word.state in ("starting", "working")
               and word.life == self._life and self._is_young(word) for word in words)

  def _is_young(self, word: HostWord) -> bool:
    """Whether the heartbeat changed recently by our clock; the other host's may differ."""
    host = word.host, word.pid
    last, heard = self._heard.get(host, (None, 0.0))
    if word.heartbeat != last:
      last, heard = word.heartbeat, self._clock()
      self._heard[host] = last, heard
    return self._clock() - heard < 4 * HEARTBEAT_SECONDS

  def _together(self, names: Sequence[str]) -> Sequence[str]:
    """Returns those of a group's unfinished cells that the next process trains."""
    if len(names) == 1:
      return names
    ready = [name for name in names if self._is_free(name)
             and self._failures(name) < max(1, self._work.max_failures - 1)]
    return ready or names[:1]

  def _attempt(self, names: Sequence[str]) -> None:
    """Makes one attempt at cells that train together; records it in each one's launch.json."""
    self._publish(names)
    trainer = Trainer(self._work.command(names), self._environ)
    try:
      launches = {name: self._begun(name, trainer) for name in names}
      code, error, stopped = self._watch(trainer, names)
    except BaseException:  # the trainer would keep the accelerator from the next agent
      if trainer.poll() is None:
        trainer.stop()
      raise
    for name, launch in launches.items():
      launches[name] = launch = self._ended(name, launch, code, error, stopped,
                                            alone=len(names) == 1)
      print(f"{name}: attempt {launch.attempt} {launch.state}"
            + (f": {launch.error}" if launch.error else ""), flush=True)
    if self._stopping:
      raise Stopped
    if any(launch.state != run_dir_lib.FINISHED for launch in launches.values()):
      self._pause(self._pace.retry)

  def _begun(self, name: str, trainer: Trainer) -> Launch:
    before, saved = read_launch(self._run_dir(name)), self._run_dir(name).saved_step()
    # Progress resets the count: only failures since the last new checkpoint matter.
    failures = before.failures if before and saved <= before.saved else 0
    launch = Launch(self._work.backend, trainer.command, 1 + (before.attempt if before else 0),
                    socket.gethostname(), trainer.pid, trainer.started, failures=failures,
                    saved=saved)
    write_launch(self._run_dir(name), launch)
    return launch

  def _ended(self, name: str, launch: Launch, code: int, error: str | None, stopped: bool,
             alone: bool) -> Launch:
    """Returns the launch with how it ended, and writes it to launch.json."""
    run_dir, told = self._run_dir(name), alone
    if not alone:
      own = ends.own_code(run_dir, launch.pid, code)
      told, code = own is not None, code if own is None else own
    error = ends.told_error(run_dir, launch.pid) or error or self._error_of(run_dir, code)
    launch = _outcome(launch, code, error, self._finished(run_dir), told, stopped)
    self._busy[name] = 1 + self._busy.get(name, 0) if launch.state == jobs_lib.BUSY else 0
    if self._busy[name] >= _MAX_BUSY:
      launch = dataclasses.replace(launch, state=run_dir_lib.FAILED,
                                   failures=self._work.max_failures)
    write_launch(run_dir, launch)
    return launch

  def _watch(self, trainer: Trainer, names: Sequence[str]) -> tuple[int, str | None, bool]:
    """Waits for the trainer. Returns (exit code, our own error or None, whether we stopped it)."""
    steps, since = None, self._clock()
    while (code := trainer.poll()) is None:
      if self._stopping or (self._beat(names[0]) and self._meter.why_too_dear()):
        return trainer.stop(), None, True
      now = [self._step_of(name) for name in names]
      if now != steps:
        steps, since = now, self._clock()
      if self._clock() - since > self._pace.hang:
        trainer.kill()
        return 1, (f"hung at step {', '.join(map(str, dict.fromkeys(steps)))}: no step for "
                   f"{self._pace.hang:.0f} s"), False
      time.sleep(self._pace.poll)
    return code, None, False

  def _publish(self, names: Sequence[str]) -> None:
    before = read_json(self._now) or {"sequence": 0}
    write_json(self._now, {"sequence": before["sequence"] + 1, "life": self._life,
                           "cells": names, "done": not names})

  def _is_free(self, name: str) -> bool:
    try:
      with self._run_dir(name).lock():
        return True
    except (run_dir_lib.RunDirBusy, FieldError, OSError):
      return False

  def _failures(self, name: str) -> int:
    launch = read_launch(self._run_dir(name))
    return launch.failures if launch else 0

  # a follower

  def _follow(self) -> None:
    trainer, done = None, 0
    try:
      while True:
        now = read_json(self._now)
        if now is None or now["life"] != self._life:
          now = {"sequence": done, "cells": [], "done": False}
        if now["sequence"] != done:
          if trainer is not None and trainer.poll() is None:
            trainer.stop()
          done, trainer = now["sequence"], None
          if now["done"]:
            return
          trainer = Trainer(self._work.command(now["cells"]), self._environ)
        self._beat(now["cells"][0] if now["cells"] else None)
        self._pause(self._pace.poll)
    finally:
      if trainer is not None and trainer.poll() is None:
        trainer.stop()

  # both

  @property
  def _now(self) -> epath.Path:
    return self._folder / "now.json"

  def _run_dir(self, name: str) -> RunDir:
    return self._work.run_dir(name)

  def _step_of(self, name: str) -> Any:
    try:
      return self._run_dir(name).read_status().get("step")
    except Exception as error:
      if not (isinstance(error, FieldError) or is_of_storage(error)):
        raise
      return None

  def _finished(self, run_dir: RunDir) -> bool:
    try:
      return ends.is_finished(run_dir)
    except FieldError:
      return False

  def _error_of(self, run_dir: RunDir, code: int) -> str:
    if code < 0:
      return f"killed by {signal.Signals(-code).name}"
    try:
      run_dir.read_status()
    except FieldError as error:
      return str(error)
    return f"ended with exit code {code}"

  def _pause(self, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not self._stopping and time.monotonic() < deadline:
      time.sleep(min(0.1, seconds))
    if self._stopping:
      raise Stopped

  def _beat(self, cell: str | None) -> bool:
    """Writes this host's heartbeat if it is due. Returns whether it was."""
    if time.time() - self._said <= HEARTBEAT_SECONDS:
      return False
    self._say("working", cell=cell)
    if self._meter is not None:
      self._meter.count()
    return True

  def _say(self, state: str, trouble: str | None = None, cell: str | None = None) -> None:
    self._said = time.time()
    write_json(self._folder / f"host-{self._worker}.json", dataclasses.asdict(HostWord(
        state, trouble, cell, socket.gethostname(), os.getpid(), self._said, self._life)))


def _outcome(launch: Launch, code: int, error: str, finished: bool, told: bool,
             stopped: bool) -> Launch:
  """Returns the launch with how it ended; only the program's own failures count as failures.

  `told` says whether the exit code is this cell's own rather than that of the whole group;
  `stopped`, whether the trainer was told to stop, and may have been killed for taking too long.
  """
  launch = dataclasses.replace(launch, ended=time.time(), exit_code=code, error=error)
  if finished:
    return dataclasses.replace(launch, state=run_dir_lib.FINISHED, error=None)
  if code == run_dir_lib.EXIT_PREEMPTED:
    return dataclasses.replace(launch, state=run_dir_lib.PREEMPTED, error=None)
  if code == run_dir_lib.EXIT_BUSY:
    return dataclasses.replace(launch, state=jobs_lib.BUSY)
  if code in _FINAL and told:
    return dataclasses.replace(launch, state=_FINAL[code])
  if code == -signal.SIGTERM or (stopped and code == -signal.SIGKILL):
    return dataclasses.replace(launch, state=jobs_lib.STOPPED)
  return dataclasses.replace(launch, state=run_dir_lib.FAILED, failures=launch.failures + 1)
