"""Saves and restores checkpoints: asynchronous, with Orbax, and a checksum for each file.

The checksums of a step (`checksums/<step>.json`, see checksums.py) are written after all its files
and before Orbax renames it into place. So a finished step always has them, however the process
ends; one without checksums, or one that does not match them, is damaged.
"""

import contextlib
import dataclasses
import errno
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging

from moe_jax import processes
from moe_jax.run_dir import RunDir
from moe_jax.train import checkpoint_files as files
from moe_jax.train import checkpoint_format, checksums
from moe_jax.train.checkpoint_format import META, PARAMS, ROUTER, CheckpointError


@dataclasses.dataclass(frozen=True)
class Restored:
  """A restored checkpoint.

  Attributes:
    step: optimizer steps taken so far.
    state: the saved state, with the requested shardings.
    data: position of the data iterator.
    meta: the caller's metadata, and `format_version`.
  """

  step: int
  state: Any
  data: Any
  meta: dict[str, Any]


class Checkpointer:
  """Saves a run's checkpoints in the background, and restores the one to resume from.

  Every process of the run creates one and calls its methods in the same order. Process 0
  must hold `RunDir.lock`. Use it as a context manager: leaving it waits for the last save.
  """

  def __init__(self, run_dir: RunDir, keep: int, keep_steps: Sequence[int] = ()):
    """Opens the checkpoints of a run.

    Args:
      run_dir: of the run.
      keep: number of latest checkpoints to keep.
      keep_steps: steps whose checkpoints are kept in addition.
    """
    self._run_dir, self._keep = run_dir, keep + len(keep_steps)
    self._writing: int | None = None
    self._failed = False  # whether a save failed, which has been reported
    self._space_checked = False
    policies = ocp.checkpoint_managers
    options = ocp.CheckpointManagerOptions(
        preservation_policy=policies.AnyPreservationPolicy(
            [policies.LatestN(keep), policies.CustomSteps(keep_steps)]),
        lightweight_initialize=True,
        async_options=ocp.AsyncOptions(post_finalization_callback=self._record_checksums))
    if jax.process_index() == 0:
      files.remove_unfinished(run_dir)  # left behind by a killed process
    self._manager = ocp.CheckpointManager(files.folder_of(run_dir), options=options)
    logging.get_absl_logger().addFilter(_reported_elsewhere)

  def save(self, step: int, state: Mapping[str, Any], data: Any,
           meta: Mapping[str, Any]) -> None:
    """Starts saving a checkpoint; returns once the arrays have been copied off the devices.

    Waits for the previous save first. A no-op if `step` is the latest checkpoint.

    Args:
      step: optimizer steps taken; must be above the step of every existing checkpoint.
      state: a dict with `params`; its values are pytrees of jax arrays.
      data: position of the data iterator, JSON.
      meta: any other metadata, JSON.

    Raises:
      CheckpointError: this or the previous save failed, e.g. because the disk is full.
      FieldError: the disk has no room for the checkpoints of this run.
    """
    self.wait()
    if step == self._manager.latest_step():
      return
    if not self._space_checked and jax.process_index() == 0:
      files.check_free_space({self._run_dir: self._keep}, state)
    self._space_checked = True
    self._writing = step
    with self._one_line():
      begun = self._manager.save(step, args=checkpoint_format.save_args(state, data, meta))
    if not begun:
      raise CheckpointError(f"checkpoint {step} is not above the latest in "
                            f"{self._manager.directory}, {self._manager.latest_step()}")

  def restore_latest(self, abstract_state: Mapping[str, Any]) -> Restored | None:
    """Restores the newest sound checkpoint; deletes newer, damaged ones, with a warning.

    Args:
      abstract_state: the state as jax.ShapeDtypeStruct, with the shardings to restore to
        (on any mesh; the first device if a sharding is missing).

    Returns:
      The checkpoint, or None if there is no finished one.

    Raises:
      CheckpointError: there are checkpoints but all are damaged (nothing is deleted then), or
        the newest sound one has another format or other arrays.
    """
    found = files.NONE
    problems: dict[int, str] = {}
    if jax.process_index() == 0:
      found, problems = files.newest_sound(self._run_dir)
      for step in problems if found >= 0 else ():
        files.warn(self._run_dir, step, problems[step], "deleted")
        files.step_dir(self._run_dir, step).rmtree()  # Orbax does not overwrite existing steps
      self._sweep_checksums()
    found = processes.from_first(lambda: found)
    self._manager.reload()
    if found == files.ALL_DAMAGED:
      raise files.all_damaged(self._run_dir, problems)
    if found == files.NONE:
      return None
    state, data, meta = checkpoint_format.read(files.step_dir(self._run_dir, found),
                                               abstract_state)
    return Restored(found, state, data, meta)

  def wait(self) -> None:
    """Waits until the pending save is on disk. Raises CheckpointError if it failed."""
    with self._one_line():
      self._manager.wait_until_finished()
    if self._writing is not None and jax.process_index() == 0:
      self._sweep_checksums()
    self._writing = None

  def close(self) -> None:
    """Waits for the pending save, then ends the background threads."""
    try:
      self.wait()
    finally:
      # Closing the manager raises the error of a failed save once more.
      with contextlib.suppress(*[Exception] if self._failed else []):
        self._manager.close()
      logging.get_absl_logger().removeFilter(_reported_elsewhere)

  def __enter__(self) -> "Checkpointer":
    return self

  def __exit__(self, kind, error, traceback) -> None:
    if error is None:
      self.close()
      return
    try:
      self.close()
    except CheckpointError as second:  # the first error is the one to show
      logging.error("%s", second)

  def _record_checksums(self) -> None:
    """Called by Orbax on process 0, in its own thread, after all files of a step are written."""
    directory = files.step_dir(self._run_dir, self._writing)
    if not directory.exists():  # on local paths, Orbax renames the step after this returns
      (directory,) = files.unfinished(self._run_dir, str(self._writing))
    checksums.record(directory, self._run_dir.checksums(self._writing))

  def _sweep_checksums(self) -> None:
    """Removes the checksums of deleted steps."""
    current = {f"{step}.json" for step in files.checkpoint_steps(self._run_dir)}
    folder = self._run_dir.checksums(0).parent
    for file in folder.iterdir() if folder.exists() else ():
      if file.name not in current:
        file.unlink(missing_ok=True)

  @contextlib.contextmanager
  def _one_line(self) -> Iterator[None]:
    """Turns any error of a save into a CheckpointError, and removes its partial files."""
    try:
      yield
    except Exception as error:
      step, self._writing, self._failed = self._writing, None, True
      if jax.process_index() == 0:
        files.remove_unfinished(self._run_dir)
      steps = [done for done in files.checkpoint_steps(self._run_dir) if done != step]
      left = f"the last good one is {steps[-1]}" if steps else "there is none before it"
      reason = ("the disk is full" if _disk_is_full(error)
                else f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
      raise CheckpointError(f"checkpoint {step} could not be written to "
                            f"{files.folder_of(self._run_dir)}: {reason}; {left}") from error


def restore_model(run_dir: RunDir, abstract_model: Mapping[str, Any],
                  step: int | None = None) -> tuple[int, dict[str, Any], dict[str, Any]]:
  """Restores the arrays of a forward pass, without writing to the run directory.

  Safe while the run is training. Only the files of the requested items and of `meta` are read and
  checked.

  Args:
    run_dir: of the run.
    abstract_model: a dict with `params` and optionally `router` (functional.abstract_model) as
      jax.ShapeDtypeStruct, with the shardings to restore to (on any mesh; the first device
      if a sharding is missing). Floats are rounded to the requested dtype, e.g. bfloat16.
    step: of the checkpoint; None means the newest sound one. With several processes, give it, so
      that all read the same checkpoint even while the run is training.

  Returns:
    (step, a dict like `abstract_model`, meta).

  Raises:
    CheckpointError: there is no such checkpoint, it is damaged, or it has other arrays.
  """
  items = tuple(name for name in (PARAMS, ROUTER) if jax.tree.leaves(
      abstract_model.get(name))) + (META,)
  step = files.sound_step(run_dir, step, items)
  model, _, meta = checkpoint_format.read(files.step_dir(run_dir, step), abstract_model,
                                          model_only=True)
  return step, model, meta


def restore_step(run_dir: RunDir, step: int, abstract_state: Mapping[str, Any]) -> Restored:
  """Restores a complete checkpoint, without writing to the run directory.

  Every process of a run must call it; process 0 verifies the checksums.

  Args:
    run_dir: of any run.
    step: of one of its checkpoints.
    abstract_state: as for Checkpointer.restore_latest.

  Raises:
    CheckpointError: there is no such checkpoint, it is damaged, or it has other arrays.
  """
  processes.from_first(lambda: files.require_sound(run_dir, step, None))
  return Restored(step, *checkpoint_format.read(files.step_dir(run_dir, step), abstract_state))


def _disk_is_full(error: BaseException) -> bool:
  code = getattr(error, "errno", None)
  return code in (errno.ENOSPC, errno.EDQUOT) or any(
      phrase in str(error) for phrase in ("No space left", "Disk quota exceeded"))


def _reported_elsewhere(record) -> bool:
  """Log filter that drops the tracebacks that Orbax logs for errors it also raises."""
  return not (record.exc_info and "orbax" in record.pathname)
