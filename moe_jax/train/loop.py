"""The training loop: takes a run from wherever it stands to its last step.

Where a run is many processes, all of them go through the same steps, checkpoints and ends, and
process 0 alone writes what is not a checkpoint.
"""

import contextlib
import math
import os
import pathlib
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
from absl import logging
from etils import epath

from moe_jax import processes
from moe_jax import run_dir as run_dir_lib
from moe_jax.config import RunConfig, identity_hash
from moe_jax.data.loader import train_dataset, train_iterator
from moe_jax.data.prepare import PreparedData, prepare
from moe_jax.errors import FieldError, require
from moe_jax.fields import leaves
from moe_jax.grid import Cell
from moe_jax.mesh import make_mesh, mesh_size
from moe_jax.run_dir import RunDir
from moe_jax.train import step as step_lib
from moe_jax.train.checkpoint import Checkpointer
from moe_jax.train.checkpoint_files import check_free_space, checkpoint_steps, lost_end
from moe_jax.train.checkpoint_format import CheckpointError
from moe_jax.train.metrics import MetricsWriter
from moe_jax.train.profile import Profile
from moe_jax.train.progress import Progress
from moe_jax.train.throughput import Throughput, peak_flops
from moe_jax.train.trunk import Trunk, find_trunk

_IN_STATUS = ("loss", "drop_rate", "tokens_per_second", "mfu")  # for launch.status


class Diverged(ArithmeticError):
  """The loss or the gradient is no longer a number; names which, and the step."""


def train(cell: Cell, out: str | os.PathLike,
          profile_steps: tuple[int, int] | None = None) -> int:
  """Trains one cell in `<out>/<experiment>/<cell>/`, going on where it was left.

  Args:
    cell: what to train.
    out: directory of all experiments.
    profile_steps: (first, last) of the steps that are profiled, counted from 1.

  Returns:
    An exit code of run_dir.py: 0 finished, EXIT_PREEMPTED after a signal (the same command
    goes on), EXIT_DIVERGED at a loss that is not finite.

  Raises:
    FieldError: the mesh, the batch, the corpus or the directory does not fit; nothing is
      written then.
    RunDirBusy: another process trains this cell.
    CheckpointError: a checkpoint cannot be written or read.
    Any of them may be raised on one of many processes alone: processes.run ends the others.
  """
  config, run_dir = cell.config, RunDir.of(out, cell)
  run_dir.check_identity(cell)
  try:
    mesh = make_mesh(config)
    prepared = prepare(config.data, epath.Path(out) / "_data")
    config.check_vocabulary(prepared.vocab_size)
    train_dataset(prepared, config.data.seq_len, config.train.batch_size, config.seed_data)
  except FieldError as error:  # `out` is a flag of its own, all else a field of the cell
    raise error if error.field == "out" else error.under("config") from None
  processes.require_same(
      {"config." + path: value for path, value in leaves(config).items()}
      | {"cell": f"{cell.experiment}/{cell.name}", "fingerprint of the text":
         prepared.fingerprint, "number of devices": jax.local_device_count()})
  use_compilation_cache(out)
  first = processes.is_first()
  with run_dir.lock() if first else contextlib.nullcontext():
    if processes.from_first(lambda: _is_finished(cell, out, mesh)):
      return 0
    require(run_dir.check_identity(cell), "out", os.fspath(out), "is not shared: this process "
            "does not see the run that process 0 has begun there")
    run = _Run(config, run_dir, prepared, mesh, find_trunk(out, cell))
    try:
      with (stop_request() as stop, processes.told_of_the_end(run.fail),
            Progress(config.train.steps, name=cell.name) if first
            else contextlib.nullcontext() as progress):
        return run.go(stop, progress, profile_steps if first else None)
    except Diverged as error:
      saved = checkpoint_steps(run_dir)
      line = (f"{error}: stopped; the last good checkpoint is "
              + (f"that of step {saved[-1]}" if saved else "none: no step was saved"))
      run.write_status(run_dir_lib.DIVERGED, error=line)
      if first:
        logging.error("%s", line)
      return run_dir_lib.EXIT_DIVERGED
    except BaseException as error:
      with contextlib.suppress(OSError):  # the disk may be what failed
        run.fail(f"{type(error).__name__}: {error}")
      raise


def _is_finished(cell: Cell, out: str | os.PathLike, mesh) -> bool:
  """Whether there is nothing left to do; if there is, the directory is claimed for it."""
  run_dir, execution = RunDir.of(out, cell), cell.config.execution
  if run_dir.read_status().get("state") == run_dir_lib.FINISHED:
    lost = lost_end(run_dir, cell.config.train.steps)
    print(f"{run_dir.path} is finished already" if lost is None
          else f"{run_dir.path} was finished, but {lost}", flush=True)
    if lost is None:
      return True
  trunk = find_trunk(out, cell)
  check_free_space(run_dir, step_lib.abstract_state(cell.config, mesh),
                   execution.keep_checkpoints + len(execution.keep_steps))
  run_dir.claim(cell, trunk and trunk.record)
  return False


class _Run:
  """What the loop holds on to: the files it writes and where it stands."""

  def __init__(self, config: RunConfig, run_dir: RunDir, prepared: PreparedData, mesh,
               trunk: Trunk | None):
    self.config, self.run_dir, self.prepared, self.mesh = config, run_dir, prepared, mesh
    self._trunk = trunk
    self._branched_from = run_dir.read_branched_from()
    self.attempt = run_dir.next_attempt()
    earlier = run_dir.read_status()
    self.step = earlier.get("step", 0)  # steps taken; what is found in _begin counts
    self.latest = {name: earlier.get(name) for name in _IN_STATUS}  # what the last line said
    self._started = earlier.get("started", time.time())
    self._commit = git_commit()
    self._first = processes.is_first()
    self._ended = threading.Event()

  def go(self, stop: list[int], progress: Progress | None,
         profile_steps: tuple[int, int] | None) -> int:
    """Trains until the end or a signal in `stop`. `progress` is None if another shows it."""
    config, execution = self.config, self.config.execution
    with (self._heartbeat(),
          Checkpointer(self.run_dir, execution.keep_checkpoints,
                       execution.keep_steps) as checkpointer,
          Profile(self.run_dir, profile_steps) as profile):
      state, batches = self._begin(checkpointer)
      train_step = step_lib.compile_train_step(config, self.mesh)
      writer = MetricsWriter(self.run_dir, self.attempt, self.step) if self._first else None
      throughput = Throughput(config, peak_flops(list(self.mesh.devices.flat))
                              if self._first else None)
      throughput.look(self.step)
      vote, stopped, pending = processes.StopVote(stop, self.mesh), 0, None
      while self.step < config.train.steps and not (stopped := vote.result()):
        batch = step_lib.put_batch(next(batches), config, self.mesh)
        profile.begin(self.step + 1)
        state, metrics = train_step(state, batch)
        profile.end(self.step + 1, metrics)
        vote.cast()
        if pending is not None:  # looked at while the device is busy with the next step
          self._settle(*pending, writer, throughput, progress)
        self.step, pending = self.step + 1, (self.step + 1, metrics)
        if self.step % execution.checkpoint_every == 0 or self.step in execution.keep_steps:
          self._settle(*pending, writer, throughput, progress)
          self._save(checkpointer, state, batches, writer)
          pending = None
      if pending is not None:
        self._settle(*pending, writer, throughput, progress)
        self._save(checkpointer, state, batches, writer)
      checkpointer.wait()
      if writer:
        writer.close()
    if self.step < config.train.steps:
      self.write_status(run_dir_lib.PREEMPTED)
      saved = f"with step {self.step} saved" if self.step else "before the first step"
      if self._first:
        logging.warning("stopped by %s %s; the same command goes on to step %d",
                        signal.Signals(stopped).name, saved, config.train.steps)
      return run_dir_lib.EXIT_PREEMPTED
    self.write_status(run_dir_lib.FINISHED)
    return 0

  def _begin(self, checkpointer: Checkpointer):
    """The state and the batches to go on with: from the last checkpoint, or new."""
    config = self.config
    batches = train_iterator(self.prepared, config.data.seq_len, config.train.batch_size,
                             config.seed_data, mine=step_lib.rows_to_read(config, self.mesh))
    abstract = step_lib.abstract_state(config, self.mesh)
    restored, identity = checkpointer.restore_latest(abstract), identity_hash(config)
    if restored is None and self._trunk is not None:
      restored, identity = self._trunk.restore(abstract), self._trunk.identity
    if restored is None:
      self.step = 0
      return step_lib.init_state(config, self.mesh), batches
    theirs = restored.meta["data_fingerprint"]
    if theirs != self.prepared.fingerprint:
      raise CheckpointError(
          f"the text of {config.data.corpus!r} has changed since step {restored.step} was "
          f"saved (fingerprint {theirs} then, {self.prepared.fingerprint} now): put the old "
          "text back, or begin the run anew elsewhere")
    if restored.meta["identity"] != identity:  # config.json was lost
      where = (self._trunk.run_dir if self._trunk else self.run_dir).path
      raise CheckpointError(f"step {restored.step} in {where} was saved by a run of another "
                            f"identity, {restored.meta['identity']}")
    batches.set_state(restored.data)
    self.step = restored.step
    if self._first:
      origin = f" of the trunk {self._trunk.record['run']}" if self._trunk else ""
      print(f"going on from step {restored.step} of {config.train.steps}{origin}", flush=True)
    return restored.state, batches

  def _save(self, checkpointer: Checkpointer, state, batches,
            writer: MetricsWriter | None) -> None:
    if writer:
      writer.next_chunk()  # so that no step before a checkpoint is missing from the metrics
    checkpointer.save(self.step, state, batches.get_state(),
                      {"data_fingerprint": self.prepared.fingerprint,
                       "identity": identity_hash(self.config)})

  def _settle(self, step: int, metrics: step_lib.Metrics, writer: MetricsWriter | None,
              throughput: Throughput, progress: Progress | None) -> None:
    """Looks at the metrics of a step that is done: stops at NaN, logs when it is time."""
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    for name in ("loss", "grad_norm"):
      if not math.isfinite(values[name]):
        if writer:
          writer.flush()
        raise Diverged(f"{name} is {values[name]} at step {step}")
    if self._first and (step % self.config.execution.log_every == 0
                        or step == self.config.train.steps):
      values |= throughput.look(step, values.get("drop_rate", 0.0))
      self.latest = values | throughput.typical()
      writer.write(step, values)
      progress.update(step, loss=values["loss"], drop_rate=values.get("drop_rate"),
                      tokens_per_second=values.get("tokens_per_second"),
                      mfu=values.get("mfu"))

  @contextlib.contextmanager
  def _heartbeat(self) -> Iterator[None]:
    """Says now and then that the run lives, also while it compiles or waits for a disk."""
    def beat():
      while not self._ended.wait(run_dir_lib.HEARTBEAT_SECONDS):
        with contextlib.suppress(OSError):  # a full disk is reported by the checkpoints
          self.write_status(run_dir_lib.RUNNING)

    self.write_status(run_dir_lib.RUNNING)
    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
      yield
    finally:
      self._ended.set()
      thread.join()

  def fail(self, error: str) -> None:
    """Says that the run ended in an error, and stops saying that it lives."""
    self._ended.set()
    self.write_status(run_dir_lib.FAILED, error=error)

  def write_status(self, state: str, error: str | None = None) -> None:
    if not self._first:
      return
    device = self.mesh.devices.flat[0]
    self.run_dir.write_status({
        "state": state, "step": self.step, "steps": self.config.train.steps,
        "attempt": self.attempt, "started": self._started, "commit": self._commit,
        "device_kind": device.device_kind, "n_devices": mesh_size(self.mesh),
        "branched_from": self._branched_from, "error": error,
        **{name: self.latest.get(name) for name in _IN_STATUS}})


@contextlib.contextmanager
def stop_request() -> Iterator[list[int]]:
  """A list that gets the signal's number on SIGTERM or SIGINT.

  The loop then saves and ends. A second SIGINT ends the process at once, as it always did; more
  SIGTERMs change nothing, since schedulers signal all processes of a job, and launchers too.
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
  """Compiled programs are kept in `<out>/_compilation_cache`, shared by all cells."""
  cache = epath.Path(out) / "_compilation_cache"
  jax.config.update("jax_compilation_cache_dir", os.fspath(cache))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def git_commit() -> str | None:
  """The commit of this code, with `+` if files differ from it; outside a checkout what the
  launcher that sent the code says, or None."""
  def git(*arguments):
    return subprocess.run(["git", *arguments], cwd=pathlib.Path(__file__).parent, text=True,
                          capture_output=True, check=True).stdout.strip()
  try:
    return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain") else "")
  except (OSError, subprocess.CalledProcessError):
    return os.environ.get("MOE_JAX_COMMIT")
