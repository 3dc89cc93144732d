"""Checkpoints: Orbax, asynchronous, with a checksum for each file; what to go on from.

The checksums of a step are written when all its files are and before Orbax renames it into
place (`checksums/<step>.json`, see checksums.py). So a finished step always has them, however
the process ends; one that has none, or fails its checksums, is damaged.
"""

import contextlib
import dataclasses
import errno
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from moe_jax import processes
from moe_jax import run_dir as run_dir_lib
from moe_jax.errors import FieldError
from moe_jax.run_dir import RunDir
from moe_jax.train import checkpoint_format, checksums
from moe_jax.train.checkpoint_format import META, PARAMS, ROUTER, CheckpointError

_NONE, _ALL_DAMAGED = -1, -2  # in place of a step, when process 0 tells the others


@dataclasses.dataclass(frozen=True)
class Restored:
  """A checkpoint that was read: `step` optimizer steps have been done.

  Attributes:
    step: of the checkpoint.
    state: as it was saved, with the shardings that were asked for.
    data: position of the data iterator.
    meta: what the caller saved beside it, and `format_version`.
  """

  step: int
  state: Any
  data: Any
  meta: dict[str, Any]


class Checkpointer:
  """Writes a run's checkpoints in the background, and finds the one to go on from.

  Every process of the run makes one and calls its methods in the same order. The process
  must hold `RunDir.lock`. Use it as a context manager: leaving it waits for the last save.
  """

  def __init__(self, run_dir: RunDir, keep: int, keep_steps: Sequence[int] = ()):
    """Opens the checkpoints of a run.

    Args:
      run_dir: of the run.
      keep: how many of the latest are kept.
      keep_steps: those of these steps are kept too.
    """
    self._run_dir, self._keep = run_dir, keep + len(keep_steps)
    self._writing: int | None = None
    self._space_checked = False
    policies = ocp.checkpoint_managers
    options = ocp.CheckpointManagerOptions(
        preservation_policy=policies.AnyPreservationPolicy(
            [policies.LatestN(keep), policies.CustomSteps(keep_steps)]),
        lightweight_initialize=True,
        async_options=ocp.AsyncOptions(post_finalization_callback=self._record_checksums))
    if jax.process_index() == 0:
      _remove_unfinished(run_dir)  # what a kill left half-written
    self._manager = ocp.CheckpointManager(_directory(run_dir), options=options)
    logging.get_absl_logger().addFilter(_reported_elsewhere)

  def save(self, step: int, state: Mapping[str, Any], data: Any,
           meta: Mapping[str, Any]) -> None:
    """Begins to write a checkpoint; returns when the arrays are copied off the devices.

    Waits for the previous save first. Does nothing if `step` is the latest checkpoint.

    Args:
      step: optimizer steps done; above that of every checkpoint there is.
      state: a dict with `params`; its values are pytrees of jax arrays.
      data: position of the data iterator, JSON.
      meta: anything else to keep, JSON.

    Raises:
      CheckpointError: this or the previous save failed; the disk is full.
      FieldError: the disk has no room for the checkpoints of this run.
    """
    self.wait()
    if step == self._manager.latest_step():
      return
    if not self._space_checked and jax.process_index() == 0:
      check_free_space(self._run_dir, state, self._keep)
    self._space_checked = True
    self._writing = step
    with self._one_line():
      begun = self._manager.save(step, args=checkpoint_format.save_args(state, data, meta))
    if not begun:
      raise CheckpointError(f"checkpoint {step} is not above the latest in "
                            f"{self._manager.directory}, {self._manager.latest_step()}")

  def restore_latest(self, abstract_state: Mapping[str, Any]) -> Restored | None:
    """Reads the newest sound checkpoint; deletes damaged ones above it, with a warning.

    Args:
      abstract_state: the state as jax.ShapeDtypeStruct, with the shardings to restore to
        (any mesh; the first device where there is none).

    Returns:
      The checkpoint, or None if none was ever finished.

    Raises:
      CheckpointError: there are checkpoints but none is sound (nothing is deleted then), or
        the newest sound one has another format or other arrays.
    """
    found = _NONE
    problems: dict[int, str] = {}
    if jax.process_index() == 0:
      found, problems = _newest_sound(self._run_dir)
      for step in problems if found >= 0 else ():
        _warn(self._run_dir, step, problems[step], "deleted")
        _step_dir(self._run_dir, step).rmtree()  # a step that exists cannot be saved again
      self._sweep_checksums()
    found = processes.from_first(lambda: found)
    self._manager.reload()
    if found == _ALL_DAMAGED:
      raise _all_damaged(self._run_dir, problems)
    if found == _NONE:
      return None
    state, data, meta = checkpoint_format.read(_step_dir(self._run_dir, found),
                                               abstract_state)
    return Restored(found, state, data, meta)

  def wait(self) -> None:
    """Waits until the save that was begun is on disk. Raises CheckpointError if it failed."""
    with self._one_line():
      self._manager.wait_until_finished()
    if self._writing is not None and jax.process_index() == 0:
      self._sweep_checksums()
    self._writing = None

  def close(self) -> None:
    """Waits for the save that was begun, then ends the background threads."""
    try:
      self.wait()
    finally:
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
    """Called by Orbax on process 0, in its thread, when a step's files are all written."""
    directory = _step_dir(self._run_dir, self._writing)
    if not directory.exists():  # local paths: Orbax renames the step when this returns
      (directory,) = _unfinished(self._run_dir, str(self._writing))
    checksums.record(directory, self._run_dir.checksums(self._writing))

  def _sweep_checksums(self) -> None:
    """Removes the checksums of steps that are gone."""
    current = {f"{step}.json" for step in checkpoint_steps(self._run_dir)}
    folder = self._run_dir.checksums(0).parent
    for file in folder.iterdir() if folder.exists() else ():
      if file.name not in current:
        file.unlink(missing_ok=True)

  @contextlib.contextmanager
  def _one_line(self) -> Iterator[None]:
    """Turns whatever ends a save into a CheckpointError, and frees what it had written."""
    try:
      yield
    except Exception as error:
      step, self._writing = self._writing, None
      if jax.process_index() == 0:
        _remove_unfinished(self._run_dir)
      steps = [done for done in checkpoint_steps(self._run_dir) if done != step]
      left = f"the last good one is {steps[-1]}" if steps else "there is none before it"
      reason = ("the disk is full" if _disk_is_full(error)
                else f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
      raise CheckpointError(f"checkpoint {step} could not be written to "
                            f"{_directory(self._run_dir)}: {reason}; {left}") from error


def restore_params(run_dir: RunDir, abstract_params: Any,
                   step: int | None = None) -> tuple[int, Any, dict[str, Any]]:
  """The parameters alone; else as `restore_model`."""
  step, model, meta = restore_model(run_dir, {PARAMS: abstract_params}, step)
  return step, model[PARAMS], meta


def restore_model(run_dir: RunDir, abstract_model: Mapping[str, Any],
                  step: int | None = None) -> tuple[int, dict[str, Any], dict[str, Any]]:
  """Reads what a forward pass needs, and changes nothing in the run directory.

  Safe while the run goes on. Only the files of what is asked for and of `meta` are read and
  checked.

  Args:
    run_dir: of the run.
    abstract_model: a dict with `params` and perhaps `router` (functional.abstract_model) as
      jax.ShapeDtypeStruct, with the shardings to restore to (any mesh; the first device
      where there is none). Floats are rounded to the type that is asked for, e.g. bfloat16.
    step: of the checkpoint; None means the newest sound one. On many hosts name it, so
      that all read the same one while the run goes on.

  Returns:
    (step, a dict like `abstract_model`, meta).

  Raises:
    CheckpointError: there is no such checkpoint, it is damaged, or holds other arrays.
  """
  items = tuple(name for name in (PARAMS, ROUTER) if jax.tree.leaves(
      abstract_model.get(name))) + (META,)
  if step is None:
    step, problems = _newest_sound(run_dir, items)
    if step == _NONE:
      raise CheckpointError(f"{_directory(run_dir)} holds no finished checkpoint")
    if step == _ALL_DAMAGED:
      raise _all_damaged(run_dir, problems)
    for damaged, problem in problems.items():
      _warn(run_dir, damaged, problem, "passed over")
  else:
    _require_sound(run_dir, step, items)
  model, _, meta = checkpoint_format.read(_step_dir(run_dir, step), abstract_model,
                                          with_data=False, cast=True)
  return step, model, meta


def restore_step(run_dir: RunDir, step: int, abstract_state: Mapping[str, Any]) -> Restored:
  """Reads one whole checkpoint, and changes nothing in the run directory.

  Every process of a run calls it; process 0 looks for damage.

  Args:
    run_dir: of any run.
    step: of one of its checkpoints.
    abstract_state: as for Checkpointer.restore_latest.

  Raises:
    CheckpointError: there is no such checkpoint, it is damaged, or holds other arrays.
  """
  processes.from_first(lambda: _require_sound(run_dir, step, None))
  return Restored(step, *checkpoint_format.read(_step_dir(run_dir, step), abstract_state))


def checkpoint_steps(run_dir: RunDir) -> list[int]:
  """Steps of the finished checkpoints, ascending, sound or not."""
  directory = _directory(run_dir)
  if not directory.exists():
    return []
  return sorted(found.step for found in
                ocp.path.step.standard_name_format().find_all(directory))


def lost_end(run_dir: RunDir, step: int) -> str | None:
  """What is wrong with the last checkpoint of a run that has finished, as a phrase.

  None if it is sound, or if all of them were deleted, which is somebody's wish.
  """
  steps = checkpoint_steps(run_dir)
  if not steps:
    return None
  if steps[-1] != step:
    return f"its last checkpoint is that of step {steps[-1]} of {step}"
  problem = _damage(run_dir, step, None)
  return problem and f"its last checkpoint is damaged: {problem}"


def check_free_space(run_dir: RunDir, state: Any, keep: int) -> None:
  """Refuses a run whose checkpoints cannot fit on the (local) disk.

  While one is written, `keep` older ones are still there. What this run's checkpoints
  already take counts as free.

  Args:
    run_dir: of the run; on an object store nothing is checked.
    state: arrays or jax.ShapeDtypeStruct.
    keep: checkpoints that are kept.

  Raises:
    FieldError: names what is needed and what is free.
  """
  directory = _directory(run_dir)
  if not run_dir_lib.is_local(directory):
    return
  each = sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
             for leaf in jax.tree.leaves(state))
  needed = each * (keep + 1)
  taken = 0
  if directory.exists():
    taken = sum((root / name).stat().length
                for root, _, names in directory.walk() for name in names)
  existing = next(path for path in (directory, *directory.parents) if path.exists())
  free = shutil.disk_usage(existing).free + taken
  if needed > free:
    raise FieldError("out", str(run_dir.path), f"needs {_size(needed)} for {keep + 1} "
                     f"checkpoints of {_size(each)}, and {_size(free)} are free")


def _size(n_bytes: float) -> str:
  return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e8 else f"{n_bytes / 1e6:.2f} MB"


def _directory(run_dir: RunDir) -> epath.Path:
  """The folder of checkpoints; absolute, as TensorStore wants it."""
  path = run_dir.checkpoints
  return path.absolute() if run_dir_lib.is_local(path) else path


def _step_dir(run_dir: RunDir, step: int) -> epath.Path:
  return _directory(run_dir) / str(step)


def _unfinished(run_dir: RunDir, step: str = "*") -> list[epath.Path]:
  """Folders of `step`, or of all steps, that Orbax has not renamed into place."""
  return list(_directory(run_dir).glob(f"{step}.orbax-checkpoint-tmp*"))


def _remove_unfinished(run_dir: RunDir) -> None:
  for directory in _unfinished(run_dir):
    with contextlib.suppress(OSError):
      directory.rmtree()


def _damage(run_dir: RunDir, step: int, items: Sequence[str] | None) -> str | None:
  return checksums.damage(_step_dir(run_dir, step), run_dir.checksums(step), items)


def _require_sound(run_dir: RunDir, step: int, items: Sequence[str] | None) -> None:
  """Raises CheckpointError where there is no such checkpoint, or a damaged one."""
  if step not in checkpoint_steps(run_dir):
    raise CheckpointError(f"{_directory(run_dir)} holds no checkpoint {step}: it has "
                          f"{', '.join(map(str, checkpoint_steps(run_dir))) or 'none'}")
  if problem := _damage(run_dir, step, items):
    raise CheckpointError(f"{_step_dir(run_dir, step)} is damaged: {problem}; choose another "
                          "checkpoint")


def _newest_sound(run_dir: RunDir, items: Sequence[str] | None = None
                  ) -> tuple[int, dict[int, str]]:
  """(step, damaged steps above it and what is wrong); step may be _NONE, _ALL_DAMAGED."""
  problems = {}
  for step in reversed(checkpoint_steps(run_dir)):
    problem = _damage(run_dir, step, items)
    if problem is None:
      return step, problems
    if _step_dir(run_dir, step).exists():  # else its run has deleted it meanwhile
      problems[step] = problem
  return (_ALL_DAMAGED if problems else _NONE), problems


def _warn(run_dir: RunDir, step: int, problem: str, what_happens: str) -> None:
  logging.warning("checkpoint %s is damaged and is %s, an earlier one is used: %s",
                  _step_dir(run_dir, step), what_happens, problem)


def _all_damaged(run_dir: RunDir, problems: Mapping[int, str]) -> CheckpointError:
  found = "; ".join(f"{step}: {problem}" for step, problem in problems.items())
  return CheckpointError(
      f"no checkpoint in {_directory(run_dir)} is sound ({found or 'see process 0'}): put a "
      "good copy back, or delete that folder and status.json beside it to train from step 0")


def _disk_is_full(error: BaseException) -> bool:
  code = getattr(error, "errno", None)
  return code in (errno.ENOSPC, errno.EDQUOT) or any(
      phrase in str(error) for phrase in ("No space left", "Disk quota exceeded"))


def _reported_elsewhere(record) -> bool:
  """Log filter: Orbax logs pages of traceback for an error that it also raises."""
  return not (record.exc_info and "orbax" in record.pathname)
