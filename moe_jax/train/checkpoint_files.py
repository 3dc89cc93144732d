"""The checkpoints of a run as files: which exist, which are damaged, how much space they need."""

import contextlib
import hashlib
import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from moe_jax.errors import FieldError
from moe_jax.files import files_below, is_local, read_json
from moe_jax.run_dir import RunDir
from moe_jax.train import checksums
from moe_jax.train.checkpoint_format import PARAMS, ROUTER, CheckpointError

NONE, ALL_DAMAGED = -1, -2  # returned instead of a step


def checkpoint_steps(run_dir: RunDir) -> list[int]:
  """Steps of the finished checkpoints, ascending, sound or not."""
  directory = folder_of(run_dir)
  if not directory.exists():
    return []
  return sorted(found.step for found in
                ocp.path.step.standard_name_format().find_all(directory))


def lost_end(run_dir: RunDir, step: int) -> str | None:
  """What is wrong with the last checkpoint of a finished run, as a phrase.

  None if it is sound, or if there are no checkpoints, which must have been deleted on purpose.
  """
  steps = checkpoint_steps(run_dir)
  if not steps:
    return None
  if steps[-1] != step:
    return f"its last checkpoint is that of step {steps[-1]} of {step}"
  problem = _damage(run_dir, step, None)
  return problem and f"its last checkpoint is damaged: {problem}"


def content_hash(run_dir: RunDir, step: int) -> str | None:
  """A hash of the model in a checkpoint (parameters and router state), from its checksums.

  None if the checksums are missing or damaged.
  """
  try:
    listed = read_json(run_dir.checksums(step))
  except FieldError:
    return None
  if not isinstance(listed, dict):
    return None
  of_the_model = {name: entry for name, entry in listed.items()
                  if name.partition("/")[0] in (PARAMS, ROUTER)}
  return hashlib.sha256(json.dumps(of_the_model, sort_keys=True).encode()).hexdigest()[:16]


def check_free_space(keep: Mapping[RunDir, int], state: Any) -> None:
  """Checks that the checkpoints of runs that train together fit on the (local) disk.

  While a checkpoint is being written, all kept ones still exist. The space that these runs'
  checkpoints already take counts as free.

  Args:
    keep: number of checkpoints to keep for each run; on an object store nothing is checked.
    state: of one of the runs: arrays or jax.ShapeDtypeStruct.

  Raises:
    FieldError: they do not fit; names the space needed and the space free.
  """
  folders = [folder_of(run_dir) for run_dir in keep]
  if not folders or not is_local(folders[0]):
    return
  each = sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
             for leaf in jax.tree.leaves(state))
  number = sum(keep.values()) + len(keep)
  taken = sum(file.stat().length for folder in folders if folder.exists()
              for file in files_below(folder))
  existing = next(path for path in (folders[0], *folders[0].parents) if path.exists())
  free = shutil.disk_usage(existing).free + taken
  if each * number > free:
    first, *others = (os.fspath(run_dir.path) for run_dir in keep)
    raise FieldError("out", first, (f"and {len(others)} more together " if others else "")
                     + f"needs {_size(each * number)} for {number} checkpoints of {_size(each)}, "
                     f"and {_size(free)} are free")


def folder_of(run_dir: RunDir) -> epath.Path:
  """The folder of checkpoints; absolute, as TensorStore requires."""
  path = run_dir.checkpoints
  return path.absolute() if is_local(path) else path


def step_dir(run_dir: RunDir, step: int) -> epath.Path:
  return folder_of(run_dir) / str(step)


def unfinished(run_dir: RunDir, step: str = "*") -> list[epath.Path]:
  """Folders of `step`, or of all steps, that Orbax has not yet renamed into place."""
  return list(folder_of(run_dir).glob(f"{step}.orbax-checkpoint-tmp*"))


def remove_unfinished(run_dir: RunDir) -> None:
  for directory in unfinished(run_dir):
    with contextlib.suppress(OSError):
      directory.rmtree()


def _damage(run_dir: RunDir, step: int, items: Sequence[str] | None) -> str | None:
  return checksums.damage(step_dir(run_dir, step), run_dir.checksums(step), items)


def require_sound(run_dir: RunDir, step: int, items: Sequence[str] | None) -> None:
  """Raises CheckpointError if the checkpoint is missing or damaged."""
  if step not in checkpoint_steps(run_dir):
    raise CheckpointError(f"{folder_of(run_dir)} holds no checkpoint {step}: it has "
                          f"{', '.join(map(str, checkpoint_steps(run_dir))) or 'none'}")
  if problem := _damage(run_dir, step, items):
    raise CheckpointError(f"{step_dir(run_dir, step)} is damaged: {problem}; choose another "
                          "checkpoint")


def newest_sound(run_dir: RunDir, items: Sequence[str] | None = None
                  ) -> tuple[int, dict[int, str]]:
  """Returns (step, newer damaged steps -> problem); step may be NONE or ALL_DAMAGED."""
  problems = {}
  for step in reversed(checkpoint_steps(run_dir)):
    problem = _damage(run_dir, step, items)
    if problem is None:
      return step, problems
    if step_dir(run_dir, step).exists():  # otherwise its run has just deleted it
      problems[step] = problem
  return (ALL_DAMAGED if problems else NONE), problems


def sound_step(run_dir: RunDir, step: int | None, items: Sequence[str] | None) -> int:
  """Returns `step`, or the newest sound one if None, with a warning for newer, damaged ones.

  Raises:
    CheckpointError: the checkpoint is missing or damaged.
  """
  if step is not None:
    require_sound(run_dir, step, items)
    return step
  step, problems = newest_sound(run_dir, items)
  if step == NONE:
    raise CheckpointError(f"{folder_of(run_dir)} holds no finished checkpoint")
  if step == ALL_DAMAGED:
    raise all_damaged(run_dir, problems)
  for damaged, problem in problems.items():
    warn(run_dir, damaged, problem, "skipped")
  return step


def warn(run_dir: RunDir, step: int, problem: str, what_happens: str) -> None:
  logging.warning("checkpoint %s is damaged and is %s, an earlier one is used: %s",
                  step_dir(run_dir, step), what_happens, problem)


def all_damaged(run_dir: RunDir, problems: Mapping[int, str]) -> CheckpointError:
  found = "; ".join(f"{step}: {problem}" for step, problem in problems.items())
  return CheckpointError(
      f"no checkpoint in {folder_of(run_dir)} is sound ({found or 'see process 0'}): put a "
      "good copy back, or delete that folder and status.json beside it to train from step 0")


def _size(n_bytes: float) -> str:
  return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e8 else f"{n_bytes / 1e6:.2f} MB"
