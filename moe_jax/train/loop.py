"""The training loop: starts or resumes runs and trains them to their last step.

Several runs of one shape form a population (population.py); a single run is a population of one.
If a run has several processes, all of them take the same steps, save the same checkpoints and end
together; only process 0 writes anything but checkpoints.
"""

import contextlib
import dataclasses
import os
import pathlib
import signal
import subprocess
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from absl import logging
from etils import epath

from moe_jax import processes
from moe_jax import run_dir as run_dir_lib
from moe_jax.config import RunConfig
from moe_jax.data.loader import train_dataset
from moe_jax.data.prepare import PreparedData, prepare
from moe_jax.errors import FieldError, require
from moe_jax.fields import leaves
from moe_jax.grid import Cell
from moe_jax.mesh import make_mesh
from moe_jax.population import require_one_shape
from moe_jax.run_dir import RunDir
from moe_jax.train import step as step_lib
from moe_jax.train.checkpoint import Checkpointer
from moe_jax.train.checkpoint_files import check_free_space, lost_end
from moe_jax.train.checkpoint_format import CheckpointError
from moe_jax.train.member import Diverged, Member
from moe_jax.train.population import Population, require_mesh
from moe_jax.train.profile import Profile
from moe_jax.train.progress import Progress
from moe_jax.train.throughput import peak_flops
from moe_jax.train.trunk import find_trunk
from moe_jax.train.warm_start import find_source

_ROOT = pathlib.Path(__file__).resolve().parents[2]  # of the checkout, if there is one
_SECTIONS = {field.name for field in dataclasses.fields(RunConfig)}


def train(cell: Cell, out: str | os.PathLike,
          profile_steps: tuple[int, int] | None = None) -> int:
  """Trains one cell; see train_together."""
  return train_together((cell,), out, profile_steps)


def train_together(cells: Sequence[Cell], out: str | os.PathLike,
                   profile_steps: tuple[int, int] | None = None) -> int:
  """Trains cells of one shape in `<out>/<experiment>/<cell>/`, resuming those that have begun.

  Args:
    cells: the cells to train. If the loss of one is not finite, or all its checkpoints are
      damaged, that run ends and the others continue.
    out: directory of all experiments.
    profile_steps: (first, last) step to profile, counted from 1, of the first cell not finished.

  Returns:
    An exit code of run_dir.py: 0 if all finished, EXIT_PREEMPTED after a signal (the same command
    resumes), EXIT_DIVERGED if a loss was not finite, 1 if some of several runs failed.

  Raises:
    FieldError: the cells differ in shape, or the mesh, the batch, the corpus, a directory or a
      run that one starts from does not fit. Nothing of the runs has been written then; the corpus
      has been prepared if it is what has too few rows or too many token ids.
    RunDirBusy: another process is training one of the cells.
    CheckpointError: a checkpoint cannot be written or read.
    Each may be raised on only one of several processes: processes.run ends the others.
  """
  require_one_shape(cells)
  first = processes.is_first()
  for cell in cells:
    RunDir.of(out, cell).check_identity(cell)
    if first:
      find_source(RunDir.of(out, cell), cell.config)
      find_trunk(out, cell)
  mesh, prepared = _fitting(cells[0].config, len(cells), out)
  _require_same_everywhere(cells, prepared)
  use_compilation_cache(out)
  with contextlib.ExitStack() as locks:
    for cell in cells if first else ():
      locks.enter_context(RunDir.of(out, cell).lock())
    todo = processes.from_first(lambda: _claim_unfinished(cells, out, mesh))
    if not todo:
      return 0
    for i in todo:
      require(RunDir.of(out, cells[i]).check_identity(cells[i]), "out", os.fspath(out),
              "is not shared: this process does not see the run that process 0 has begun there")
    commit = git_commit()
    members = [Member(cells[i], out, prepared, mesh, commit) for i in todo]
    try:
      with contextlib.ExitStack() as stack:
        stop = stack.enter_context(stop_request())
        for member in members:
          stack.enter_context(processes.told_of_the_end(member.fail))
        progress = stack.enter_context(_progress(members)) if first else None
        return _go(members, mesh, stop, progress, profile_steps if first else None)
    except BaseException as error:
      for member in members:
        with contextlib.suppress(Exception):  # the disk or bucket may be what failed
          member.fail(f"{type(error).__name__}: {error}")
      raise


def _fitting(config: RunConfig, n_cells: int, out: str | os.PathLike
             ) -> tuple[jax.sharding.Mesh, PreparedData]:
  """Returns the mesh and data for the cells. Raises FieldError if they do not fit together."""
  try:
    mesh = make_mesh(config)
    require_mesh(n_cells, mesh)  # before preparing the corpus, which may take an hour
    prepared = prepare(config.data, epath.Path(out) / "_data")
    config.check_vocabulary(prepared.vocab_size)
    train_dataset(prepared, config.data.seq_len, config.train.batch_size, config.seed_data)
  except FieldError as error:
    section = error.field.partition(".")[0]
    raise error.under("config") if section in _SECTIONS else error from None
  return mesh, prepared


def _require_same_everywhere(cells: Sequence[Cell], prepared: PreparedData) -> None:
  """Raises FieldError if this process was told to train something other than process 0."""
  for cell in cells:
    processes.require_same(
        {"config." + path: value for path, value in leaves(cell.config).items()}
        | {"cell": f"{cell.experiment}/{cell.name}", "fingerprint of the text":
           prepared.fingerprint, "number of devices": jax.local_device_count()})


def _claim_unfinished(cells: Sequence[Cell], out: str | os.PathLike, mesh) -> list[int]:
  """Claims the run directories of the unfinished cells and returns the cells' indices."""
  todo = {i: RunDir.of(out, cell) for i, cell in enumerate(cells) if not _is_finished(cell, out)}
  check_free_space({run_dir: cells[i].config.execution.keep_checkpoints
                    + len(cells[i].config.execution.keep_steps) for i, run_dir in todo.items()},
                   step_lib.abstract_state(cells[0].config, mesh))
  for i, run_dir in todo.items():
    trunk = find_trunk(out, cells[i])
    source = None if trunk else find_source(run_dir, cells[i].config)
    run_dir.claim(cells[i], trunk and trunk.record, source and source.record)
  return list(todo)


def _is_finished(cell: Cell, out: str | os.PathLike) -> bool:
  """Whether the run finished and its last checkpoint is intact; prints a line if it finished."""
  run_dir = RunDir.of(out, cell)
  if run_dir.read_status().get("state") != run_dir_lib.FINISHED:
    return False
  lost = lost_end(run_dir, run_dir.read_status().get("step", cell.config.train.steps))
  print(f"{run_dir.path} is finished already" if lost is None
        else f"{run_dir.path} was finished, but {lost}", flush=True)
  return lost is None


def _progress(members: Sequence[Member]) -> Progress:
  name, *others = (member.cell.name for member in members)
  return Progress(max(member.steps for member in members),
                  name=f"{name} and {len(others)} more" if others else name)


def _go(members: Sequence[Member], mesh, stop: list[int], progress: Progress | None,
        profile_steps: tuple[int, int] | None) -> int:
  """Trains all members until they end or a signal arrives in `stop`; returns the exit code.

  `progress` is None on all processes but the first.
  """
  with contextlib.ExitStack() as stack:
    stack.enter_context(_heartbeat(members))
    states = []
    for member in members:
      try:
        states.append(member.begin(stack.enter_context(Checkpointer(
            member.run_dir, member.config.execution.keep_checkpoints,
            member.config.execution.keep_steps))))
      except CheckpointError as error:
        if len(members) == 1:
          raise
        logging.error("%s: %s", member.cell.name, error)
        member.fail(f"CheckpointError: {error}")
    failed = len(states) < len(members)
    members = [member for member in members if member.ended is None]
    if not members:
      return 1
    profile = stack.enter_context(Profile(members[0].run_dir, profile_steps))
    population = Population([member.config for member in members], mesh)
    peak = peak_flops(list(mesh.devices.flat)) if processes.is_first() else None
    for member in members:
      member.watch(peak)
    state = population.join(states)
    del states  # otherwise every array would be held twice
    stopped = _Loop(members, population, state, progress, profile).run(
        processes.StopVote(stop, mesh))
    for member in members:
      member.close()
  for member in members:  # only now, so that FINISHED implies that every member is saved
    if member.ended is None:
      member.end(run_dir_lib.FINISHED if member.step == member.steps else run_dir_lib.PREEMPTED)
      if member.step < member.steps and processes.is_first():
        saved = f"with step {member.step} saved" if member.step else "before the first step"
        logging.warning("stopped by %s %s; run the same command to resume, up to step %d",
                        signal.Signals(stopped).name, saved, member.steps)
  ends = {member.ended for member in members}
  if run_dir_lib.PREEMPTED in ends:
    return run_dir_lib.EXIT_PREEMPTED
  if run_dir_lib.DIVERGED in ends:
    return run_dir_lib.EXIT_DIVERGED
  return int(failed)


class _Loop:
  """Takes the training steps of all members in parallel.

  Each member counts its own steps. The counts may differ, e.g. after a kill while saving: each
  member resumes from its own checkpoint. A member that has ended stays in the population, so
  that the compiled program does not change; its results are ignored.
  """

  def __init__(self, members: Sequence[Member], population: Population, state: step_lib.State,
               progress: Progress | None, profile: Profile):
    self._members, self._population, self._state = members, population, state
    self._progress, self._profile = progress, profile
    self._pending: tuple[list[int | None], step_lib.Metrics] | None = None
    reading: dict[Any, Any] = {}
    for member in members:  # members at the same position of the same data share one iterator
      position = member.config.seed_data, member.step
      member.batches = reading.setdefault(position, member.batches)

  def run(self, vote: processes.StopVote) -> int:
    """Trains until all members end or a signal arrives; returns the signal's number, or 0."""
    members, stopped = self._members, 0
    while any(member.active for member in members) and not (stopped := vote.result()):
      read = {batches: next(batches) for batches in {member.batches for member in members}}
      batch = self._population.put_batch([read[member.batches] for member in members])
      step = 1 + next(member.step for member in members if member.active)
      self._profile.begin(step)
      self._state, metrics = self._population.step(self._state, batch)
      self._profile.end(step, metrics)
      vote.cast()
      taken = [member.step + 1 if member.active else None for member in members]
      self._settle()  # the previous step's metrics, while the device is busy with this one
      for member in members:
        member.step += member.active
      self._pending = taken, metrics
      if any(member.due for member in members):
        self._settle()
        self._save([member.due for member in members])
    self._settle()
    self._save([member.unsaved for member in members])
    return stopped

  def _save(self, wanted: Sequence[bool]) -> None:
    for i, member in enumerate(self._members):
      if wanted[i] and member.ended is None:
        member.save(self._population.state_of(self._state, i))

  def _settle(self) -> None:
    """Waits for the metrics of the pending step and handles them; a member ends at a NaN."""
    if self._pending is None:
      return
    (steps, metrics), self._pending = self._pending, None
    logged = []
    for member, step, values in zip(self._members, steps, self._population.values(metrics),
                                    strict=True):
      if step is None or member.ended is not None:
        continue
      try:
        if member.settle(step, values):
          logged.append((step, member.latest))
      except Diverged as error:
        member.diverge(error)
    if logged and self._progress is not None:
      self._show(*zip(*logged, strict=True))

  def _show(self, steps: Sequence[int], latest: Sequence[dict[str, Any]]) -> None:
    """Shows means of losses and drop rates, and sums of speeds."""
    def total(name):
      values = [each.get(name) for each in latest]
      return None if None in values else sum(values)

    drop_rate = total("drop_rate")
    self._progress.update(
        max(steps), loss=total("loss") / len(latest),
        drop_rate=drop_rate if drop_rate is None else drop_rate / len(latest),
        tokens_per_second=total("tokens_per_second"), mfu=total("mfu"))


@contextlib.contextmanager
def _heartbeat(members: Sequence[Member]) -> Iterator[None]:
  """Writes the members' heartbeats from a thread, even while they compile or wait for storage."""
  over = threading.Event()

  def beat():
    told = False
    while not over.wait(run_dir_lib.HEARTBEAT_SECONDS):
      for member in members:
        try:
          member.beat()
        except Exception as error:
          # A full disk or a busy bucket: the next one may succeed. Go on after any error, because
          # without heartbeats the run would count as dead, and another trainer might take it over.
          if not told:
            logging.warning("%s's heartbeat cannot be written: %s", member.run_dir.path,
                            " ".join(str(error).split()))
          told = True

  for member in members:
    member.beat()
  thread = threading.Thread(target=beat, daemon=True)
  thread.start()
  try:
    yield
  finally:
    over.set()
    thread.join()


@contextlib.contextmanager
def stop_request() -> Iterator[list[int]]:
  """Yields a list that receives the signal's number on SIGTERM or SIGINT.

  The loop then saves and ends. A second SIGINT gets Python's usual handling and ends the process
  at once; further SIGTERMs have no effect, since schedulers and launchers may each send one to
  every process of a job.
  """
  received: list[int] = []
  previous: dict[int, Any] = {}

  def note(number, _):
    received.append(number)
    if number == signal.SIGINT:
      signal.signal(number, previous[number])

  for number in (signal.SIGTERM, signal.SIGINT):
    previous[number] = signal.signal(number, note)
  try:
    yield received
  finally:
    for number, handler in previous.items():
      signal.signal(number, handler)


def use_compilation_cache(out: str | os.PathLike) -> None:
  """Caches compiled programs in `<out>/_compilation_cache`, shared by all cells."""
  cache = epath.Path(out) / "_compilation_cache"
  jax.config.update("jax_compilation_cache_dir", os.fspath(cache))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def git_commit() -> str | None:
  """The commit of this code, with `+` if files differ from it.

  Outside a checkout, the commit reported by the launcher that sent the code, or None.
  """
  def git(*arguments):
    return subprocess.run(["git", *arguments], cwd=_ROOT, text=True,
                          capture_output=True, check=True).stdout.strip()
  try:
    if pathlib.Path(git("rev-parse", "--show-toplevel")) == _ROOT:  # not an enclosing checkout
      return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain") else "")
  except (OSError, subprocess.CalledProcessError):
    pass
  return os.environ.get("MOE_JAX_COMMIT")
