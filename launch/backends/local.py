"""Runs cells on this machine, one process per cell.

Cells of one shape share a process where `execution.population` says so.

Each launch runs a cell once. A cell that crashes (exit 1, or killed by a signal) is retried
once if it got further than where it began, since then the crash may not repeat. A cell that
rejected its input, diverged, was told to stop or is held by another process is left as it is.
The next launch resumes all cells that are not finished.

Ctrl-C (SIGINT), SIGTERM or SIGHUP to the launcher sends SIGTERM to every child, whose trainer
saves a checkpoint and ends; a second signal kills the children. The launcher's exit code is 0
if all cells are finished, 128 + the signal's number if it was stopped, else 1.

A branch waits until its trunk has saved the checkpoint it branches from, and then runs beside
it. A run that starts from another run's parameters (`train.init_from`) waits for the step it
names or, if it names none, until that run is finished. If the other run ends without saving
that checkpoint, the waiting one is not started.

A killed launcher leaves its children running. They hold the locks of their run directories, so
the next launch detects them, names the process, and leaves those cells alone.

Children inherit the environment. Those that share a GPU each get a share of its memory. A TPU
serves one process at a time: keep --parallel=1 there.
"""

import collections
import contextlib
import dataclasses
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence

from launch import ends
from launch import jobs as jobs_lib
from launch.jobs import (
  Job,
  Launch,
  joint_command,
  read_launch,
  trained_together,
  write_launch,
)
from launch.overview import Overview
from launch.state import CellState, read_state
from launch.table import progress
from moe_jax import run_dir as run_dir_lib
from moe_jax.cli import EXIT_BAD_INPUT
from moe_jax.cluster import share_of_memory
from moe_jax.errors import FieldError, require
from moe_jax.files import is_local

POLL_SECONDS = 0.1
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_STATE_OF_EXIT = {
    EXIT_BAD_INPUT: jobs_lib.REFUSED, run_dir_lib.EXIT_PREEMPTED: run_dir_lib.PREEMPTED,
    run_dir_lib.EXIT_DIVERGED: run_dir_lib.DIVERGED, run_dir_lib.EXIT_BUSY: jobs_lib.BUSY,
}


def dry_run(jobs: Sequence[Job]) -> list[str]:
  """Returns the shell lines that `submit` would run, with a comment for each cell it would skip."""
  return [*(f"# {job.name} is finished" for job in jobs if job.is_finished()),
          *(shlex.join(joint_command([job.command for job in group]))
            for group in trained_together(jobs))]


def submit(jobs: Sequence[Job], parallel: int) -> int:
  """Runs the jobs, `parallel` at a time.

  Returns:
    The launcher's exit code; see the module's docstring.

  Raises:
    FieldError: a run directory is not on a file system of this machine.
  """
  for job in jobs:
    require(is_local(job.run_dir.path), "out", os.fspath(job.run_dir.path),
            "must be a local path: this backend keeps each cell's log.txt open")
  with Overview() as overview:
    return _Launcher(jobs, parallel, overview).run()


@dataclasses.dataclass
class _Child:
  """A running trainer of one or several cells. `launches` and `first_steps` (the steps that the
  runs had reached when it was started) are in the order of `jobs`."""

  jobs: tuple[Job, ...]
  process: subprocess.Popen
  launches: tuple[Launch, ...]
  first_steps: tuple[int, ...]


class _Launcher:
  """Runs the jobs of one launch; tracks which are waiting, running and ended."""

  def __init__(self, jobs: Sequence[Job], parallel: int, overview: Overview):
    self._jobs, self._parallel, self._overview = jobs, parallel, overview
    self._waiting = collections.deque(trained_together(jobs))
    side_by_side = min(parallel, len(self._waiting))
    self._environ = dict(os.environ) if side_by_side < 2 else share_of_memory(os.environ,
                                                                              side_by_side)
    self._running: list[_Child] = []
    self._retried: set[str] = set()
    self._unfinished: dict[str, str] = {}  # cell name -> why
    self._received: list[int] = []  # signals
    self._passed_on = 0  # how many of them were passed on to the children

  def run(self) -> int:
    todo = sum(not job.is_finished() for job in self._jobs)
    self._say(f"{len(self._jobs)} cells, {len(self._jobs) - todo} already finished, "
              f"{todo} to run, {self._parallel} at a time"
              + (f", in {len(self._waiting)} groups" if len(self._waiting) < todo else ""))
    with self._catching_signals():
      try:
        while self._running or (self._waiting and not self._received):
          self._pass_signals_on()
          self._reap()
          self._start_waiting()
          self._overview.show(self._states, f"{sum(map(len, self._trained))} running, "
                              f"{sum(map(len, self._waiting))} waiting of {len(self._jobs)}")
          time.sleep(POLL_SECONDS)
      except BaseException:  # a fault of the launcher's own must not orphan the children
        for child in self._running:
          child.process.terminate()
        for child in self._running:
          child.process.wait()
        raise
    return self._conclude()

  def _say(self, text: str) -> None:
    self._overview.line(text)

  @property
  def _trained(self) -> list[tuple[Job, ...]]:
    return [child.jobs for child in self._running]

  def _states(self) -> list[CellState]:
    return [read_state(job.run_dir, job.cell) for group in self._trained for job in group]

  # signals

  @contextlib.contextmanager
  def _catching_signals(self) -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    for number in _SIGNALS:
      if number != signal.SIGHUP or before[number] != signal.SIG_IGN:  # respect nohup
        signal.signal(number, lambda received, _: self._received.append(received))
    try:
      yield
    finally:
      for number, handler in before.items():
        signal.signal(number, handler)

  def _pass_signals_on(self) -> None:
    while self._passed_on < len(self._received):
      self._passed_on += 1
      if self._passed_on == 1:
        self._say(f"stopping: {sum(map(len, self._trained))} running cells are saving a "
                  "checkpoint; Ctrl-C again kills them")
      for child in self._running:
        if self._passed_on == 1:  # only the trainer, which handles its own data workers
          child.process.terminate()
        else:
          _kill_group(child.process)

  # children

  def _start_waiting(self) -> None:
    while len(self._running) < self._parallel and not self._received:
      group = self._next_ready()
      if group is None:
        return
      ready = tuple(job for job in group if self._can_start(job))
      if not ready:
        continue
      try:
        child = _start(ready, self._environ)
      except OSError as error:
        for job in ready:
          self._not_started(job, str(error))
        continue
      self._running.append(child)
      for job in ready:
        self._say(f"{job.name}: started, process {child.process.pid}, "
                  f"log {ready[0].run_dir.log}")

  def _can_start(self, job: Job) -> bool:
    """Whether to start the job; logs the reason if it should start but cannot."""
    if job.is_finished():  # meanwhile, by another launcher
      return False
    if (trunk := job.missing_trunk()) and self._is_ours(trunk):
      self._not_started(job, f"its trunk {trunk.path.name} ended before it saved step "
                        f"{job.cell.config.train.branch_step}")
      return False
    if (source := job.missing_source()) and self._is_ours(source):
      step = job.cell.config.train.init_step
      self._not_started(job, f"its source {source.path.name} ended before it saved "
                        f"{'its last step' if step is None else f'step {step}'}")
      return False
    try:
      with job.run_dir.lock():
        return True
    except (run_dir_lib.RunDirBusy, OSError) as error:
      self._not_started(job, str(error))
      return False

  def _not_started(self, job: Job, why: str) -> None:
    self._unfinished[job.name] = why
    self._say(f"{job.name}: not started: {why}")

  def _next_ready(self) -> tuple[Job, ...] | None:
    """Pops the first waiting group that needs no checkpoint which this launch may still save."""
    to_come = {job.run_dir for group in (*self._waiting, *self._trained) for job in group}
    for group in self._waiting:
      if not any({job.missing_trunk(), job.missing_source()} & to_come for job in group):
        self._waiting.remove(group)
        return group
    return None

  def _is_ours(self, run_dir: run_dir_lib.RunDir) -> bool:
    return any(job.run_dir == run_dir for job in self._jobs)

  def _reap(self) -> None:
    for child in list(self._running):
      if child.process.poll() is None:
        continue
      self._running.remove(child)
      _kill_group(child.process)  # workers that a crashed trainer left behind
      again = []
      for i, job in enumerate(child.jobs):
        launch = _outcome(child, i, stopping=bool(self._received))
        with contextlib.suppress(OSError):  # a full disk; the trainer's own files have it too
          write_launch(job.run_dir, launch)
        if self._is_tried_again(job, launch, child.first_steps[i]):
          again.append(job)
      if again:
        self._waiting.appendleft(tuple(again))

  def _is_tried_again(self, job: Job, launch: Launch, first_step: int) -> bool:
    """Logs how a run ended. Returns whether to retry it."""
    row = read_state(job.run_dir, job.cell)
    if launch.state == run_dir_lib.FINISHED:
      self._say(f"{job.name}: {progress(row)}, {launch.ended - launch.started:.0f} s")
      return False
    reached = launch.state
    if row.step is not None:
      reached += f" at step {row.step} of {row.steps}"
    if launch.error:
      reached += f": {launch.error}"
    self._say(f"{job.name}: {reached}")
    if (launch.state == run_dir_lib.FAILED and (row.step or 0) > first_step
        and job.name not in self._retried and not self._received):
      self._say(f"{job.name}: it made progress before failing; retrying once")
      self._retried.add(job.name)
      return True
    self._unfinished[job.name] = f"{reached}\n    log: {job.run_dir.log}"
    return False

  def _conclude(self) -> int:
    left = [job for job in self._jobs if not job.is_finished()]
    if not left:
      self._say(f"all {len(self._jobs)} cells are finished")
      return 0
    self._say(f"{len(self._jobs) - len(left)} of {len(self._jobs)} cells are finished; "
              "unfinished:")
    tried = [job.name for job in left if job.name in self._unfinished]
    for name in tried:
      self._say(f"  {name}: {self._unfinished[name]}")
    if len(left) > len(tried):
      self._say(f"  {len(left) - len(tried)} not started")
    self._say(f"to resume: {shlex.join(sys.orig_argv)}")
    return 128 + self._received[0] if self._received else 1


def _start(jobs: tuple[Job, ...], environ: Mapping[str, str]) -> _Child:
  """Starts the trainer in a process group of its own, so that Ctrl-C does not reach it.

  Its output goes to the log of the first cell; the logs of the others refer to that one.
  """
  attempts = tuple(_attempts(job) + 1 for job in jobs)
  first_steps = tuple(read_state(job.run_dir, job.cell).step or 0 for job in jobs)
  command, started = joint_command([job.command for job in jobs]), time.time()
  stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(started))
  log_of_all = jobs[0].run_dir.log
  for job, attempt in zip(jobs, attempts, strict=True):
    how = (shlex.join(command) if job is jobs[0] else
           f"in one process with other cells, log {log_of_all}")
    with open(job.run_dir.log, "ab") as log:
      log.write(f"==== {stamp} launch {attempt}: {how}\n".encode())
  with open(log_of_all, "ab") as log:
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log,
                               stderr=subprocess.STDOUT, start_new_session=True, env=environ)
  launches = tuple(Launch(backend="local", command=command, attempt=attempt,
                          host=socket.gethostname(), pid=process.pid, started=started)
                   for attempt in attempts)
  for job, launch in zip(jobs, launches, strict=True):
    with contextlib.suppress(OSError):  # the child is running and must stay tracked
      write_launch(job.run_dir, launch)
  return _Child(jobs, process, launches, first_steps)


def _attempts(job: Job) -> int:
  try:
    previous = read_launch(job.run_dir)
  except FieldError:  # a damaged file only costs the count
    return 0
  return previous.attempt if previous else 0


def _outcome(child: _Child, i: int, stopping: bool) -> Launch:
  """Returns the launch of the child's i-th cell with its final state, exit code and error."""
  job = child.jobs[i]
  code = _code_of(child, job)
  if code == 0 and job.is_finished():
    state, error = run_dir_lib.FINISHED, None
  elif code == 0:
    state, error = run_dir_lib.FAILED, "exited without an error, but is not finished"
  elif code < 0:
    state = jobs_lib.STOPPED if stopping else run_dir_lib.FAILED
    error = f"killed by {signal.Signals(-code).name}"
  else:
    state = _STATE_OF_EXIT.get(code, run_dir_lib.FAILED)
    error = None if state == run_dir_lib.PREEMPTED else _error_of(child, job)
  return dataclasses.replace(child.launches[i], ended=time.time(), state=state, exit_code=code,
                             error=error)


def _code_of(child: _Child, job: Job) -> int:
  """Returns the exit code the trainer would have had if it had trained this cell alone."""
  code = child.process.returncode
  own = ends.own_code(job.run_dir, child.process.pid, code) if len(child.jobs) > 1 else None
  return code if own is None else own


def _error_of(child: _Child, job: Job) -> str:
  """Returns the error in the trainer's status or, if there is none, the last line of its log."""
  if told := ends.told_error(job.run_dir, child.process.pid):
    return told
  with open(child.jobs[0].run_dir.log, "rb") as log:
    log.seek(max(0, os.fstat(log.fileno()).st_size - 8192))
    lines = log.read().decode(errors="replace").split("\n")
  last = next((line.strip() for line in reversed(lines) if line.strip()), "")
  return last.removeprefix("error: ")  # how a refusal begins


def _kill_group(process: subprocess.Popen) -> None:
  with contextlib.suppress(ProcessLookupError):
    os.killpg(process.pid, signal.SIGKILL)
