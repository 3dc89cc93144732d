"""The state of one run during training, alone or in a population: its files and its progress."""

import math
import os
import threading
import time

from absl import logging

from moe_jax import processes
from moe_jax import run_dir as run_dir_lib
from moe_jax.config import identity_hash
from moe_jax.data.loader import train_iterator
from moe_jax.data.prepare import PreparedData
from moe_jax.grid import Cell
from moe_jax.mesh import mesh_size
from moe_jax.run_dir import RunDir
from moe_jax.train import step as step_lib
from moe_jax.train.checkpoint import Checkpointer
from moe_jax.train.checkpoint_files import checkpoint_steps
from moe_jax.train.checkpoint_format import CheckpointError
from moe_jax.train.metrics import MetricsWriter
from moe_jax.train.throughput import Throughput
from moe_jax.train.trunk import find_trunk
from moe_jax.train.warm_start import first_state

_IN_STATUS = ("loss", "drop_rate", "tokens_per_second", "mfu")  # for launch.status


class Diverged(ArithmeticError):
  """The loss or the gradient is not finite; names which, and the step."""


class Member:
  """One run of the training loop. Only process 0 writes anything but checkpoints."""

  def __init__(self, cell: Cell, out: str | os.PathLike, prepared: PreparedData, mesh,
               commit: str | None):
    self.cell, self.config, self.run_dir = cell, cell.config, RunDir.of(out, cell)
    self._prepared, self._mesh, self._commit = prepared, mesh, commit
    self._trunk = find_trunk(out, cell)
    self._branched_from = self.run_dir.read_branched_from()
    self._attempt = self.run_dir.next_attempt()
    earlier = self.run_dir.read_status()
    self.step = earlier.get("step", 0)  # steps taken; provisional until begin()
    self.latest = {name: earlier.get(name) for name in _IN_STATUS}  # last logged metrics
    self._started = earlier.get("started", time.time())
    self._first = processes.is_first()
    self._saved_step = 0
    self._checkpointer: Checkpointer | None = None
    self._writer: MetricsWriter | None = None
    self._throughput: Throughput | None = None
    self._status_lock = threading.Lock()
    self.ended: str | None = None  # final state, one of run_dir.py's; None until it ends

  @property
  def steps(self) -> int:
    return self.config.train.steps

  @property
  def active(self) -> bool:
    """Whether it still has steps to take."""
    return self.ended is None and self.step < self.steps

  # training

  def begin(self, checkpointer: Checkpointer) -> step_lib.State:
    """Returns the state to start with: from the run's or its trunk's checkpoint, or new."""
    self._checkpointer = checkpointer
    config = self.config
    self.batches = train_iterator(
        self._prepared, config.data.seq_len, config.train.batch_size, config.seed_data,
        mine=step_lib.rows_to_read(config, self._mesh))
    abstract = step_lib.abstract_state(config, self._mesh)
    restored, identity = checkpointer.restore_latest(abstract), identity_hash(config)
    if restored is None and self._trunk is not None:
      restored, identity = self._trunk.restore(abstract), self._trunk.identity
    if restored is None:
      self.step = 0
      return first_state(self.run_dir, config, self._mesh)
    theirs = restored.meta["data_fingerprint"]
    if theirs != self._prepared.fingerprint:
      raise CheckpointError(
          f"the text of {config.data.corpus!r} has changed since step {restored.step} was "
          f"saved (fingerprint {theirs} then, {self._prepared.fingerprint} now): restore the "
          "old text, or start a new run with another --out")
    owner = self._trunk.run_dir if self._trunk else self.run_dir
    # Older versions hashed explicit defaults differently; config.json then has the same old hash.
    # A real mismatch is possible if config.json was lost.
    if restored.meta["identity"] not in (identity, owner.read_identity()):
      raise CheckpointError(f"step {restored.step} in {owner.path} was saved by a run of another "
                            f"identity, {restored.meta['identity']}")
    self.batches.set_state(restored.data)
    self.step = self._saved_step = restored.step
    if self._first:
      origin = f" of the trunk {self._trunk.record['run']}" if self._trunk else ""
      print(f"resuming from step {restored.step} of {self.steps}{origin}", flush=True)
    return restored.state

  def watch(self, peak: float | None) -> None:
    """Starts writing metrics and measuring throughput, relative to `peak` FLOP/s."""
    self._writer = MetricsWriter(self.run_dir, self._attempt, self.step) if self._first else None
    self._throughput = Throughput(self.config, peak)
    self._throughput.look(self.step)

  @property
  def due(self) -> bool:
    """Whether a checkpoint is due at the current step."""
    execution = self.config.execution
    return (self.step % execution.checkpoint_every == 0 or self.step in execution.keep_steps
            or self.step == self.steps) and self.unsaved

  @property
  def unsaved(self) -> bool:
    return self.ended is None and self.step != self._saved_step

  def save(self, state: step_lib.State) -> None:
    if self._writer:
      self._writer.next_chunk()  # flushes, so that no step before a checkpoint lacks metrics
    self._checkpointer.save(self.step, state, self.batches.get_state(),
                            {"data_fingerprint": self._prepared.fingerprint,
                             "identity": identity_hash(self.config)})
    self._saved_step = self.step

  def settle(self, step: int, values: dict[str, float]) -> bool:
    """Checks the metrics of a finished step and logs them if due; returns whether it did.

    Raises:
      Diverged: the loss or the gradient norm is not finite.
    """
    for name in ("loss", "grad_norm"):
      if not math.isfinite(values[name]):
        if self._writer:
          self._writer.flush()
        raise Diverged(f"{name} is {values[name]} at step {step}")
    if not self._first or (step % self.config.execution.log_every and step != self.steps):
      return False
    values = values | self._throughput.look(step, values.get("drop_rate", 0.0))
    self.latest = values | self._throughput.typical()
    self._writer.write(step, values)
    return True

  # ending

  def close(self) -> None:
    """Waits for the last save and closes the metrics."""
    self._checkpointer.wait()
    if self._writer:
      self._writer.close()

  def diverge(self, error: Diverged) -> None:
    self._checkpointer.wait()
    saved = checkpoint_steps(self.run_dir)
    line = (f"{error}: stopped; the last good checkpoint is "
            + (f"that of step {saved[-1]}" if saved else "none: no step was saved"))
    self.end(run_dir_lib.DIVERGED, error=line)
    if self._first:
      logging.error("%s", line)

  def fail(self, error: str) -> None:
    """Marks the run as failed, unless it has ended already."""
    if self.ended is None:
      self.end(run_dir_lib.FAILED, error)

  def end(self, state: str, error: str | None = None) -> None:
    """Writes the final state to status.json and stops heartbeats."""
    self.ended = state
    with self._status_lock:
      self._write_status(state, error)

  def beat(self) -> None:
    """Writes a heartbeat, unless the run has ended."""
    with self._status_lock:
      if self.ended is None:
        self._write_status(run_dir_lib.RUNNING, None)

  def _write_status(self, state: str, error: str | None) -> None:
    if not self._first:
      return
    self.run_dir.write_status({
        "state": state, "step": self.step, "steps": self.steps,
        "attempt": self._attempt, "started": self._started, "commit": self._commit,
        "device_kind": self._mesh.devices.flat[0].device_kind,
        "n_devices": mesh_size(self._mesh),
        "branched_from": self._branched_from, "error": error,
        **{name: self.latest.get(name) for name in _IN_STATUS}})
