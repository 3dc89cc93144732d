"""Profiles selected steps into `<run>/profile/`, in the format that xprof reads."""

import contextlib
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
from absl import logging
from etils import epath

from moe_jax.files import is_local, write_bytes
from moe_jax.run_dir import RunDir


class Profile:
  """Traces the steps `first` to `last`, inclusive, counted from 1.

  Call `begin` before each step is dispatched to the devices and `end` after. Of the steps, only
  those that this attempt takes are traced: a run may resume in the middle of them.
  """

  def __init__(self, run_dir: RunDir, steps: tuple[int, int] | None):
    """`steps` is (first, last), or None to trace nothing."""
    self._run_dir, self._steps = run_dir, steps
    self._open = contextlib.ExitStack()
    self._active, self._done = False, steps is None

  def begin(self, step: int) -> None:
    if not (self._active or self._done) and self._steps[0] <= step <= self._steps[1]:
      self._open.enter_context(_trace(self._run_dir.profile))
      self._active = True

  def end(self, step: int, results: Any) -> None:
    """After the last step, waits for its `results` and stops the trace."""
    if self._active and step >= self._steps[1]:
      jax.block_until_ready(results)
      self._stop()

  def _stop(self) -> None:
    self._active, self._done = False, True
    self._open.close()

  def __enter__(self) -> "Profile":
    return self

  def __exit__(self, *_) -> None:
    if self._active:  # the run ended before the last step to profile
      self._stop()
    if not self._done:
      logging.warning("no profile: this attempt did none of the steps %d to %d", *self._steps)


@contextlib.contextmanager
def _trace(folder: epath.Path) -> Iterator[None]:
  """Traces into `folder`; for an object store, via a local temporary folder."""
  with contextlib.ExitStack() as stack:
    local = folder
    if not is_local(folder):
      local = epath.Path(stack.enter_context(tempfile.TemporaryDirectory()))
    with jax.profiler.trace(local):
      yield
    if local != folder:
      _copy(pathlib.Path(local), folder)


def _copy(source: pathlib.Path, target: epath.Path) -> None:
  for file in source.rglob("*"):
    if file.is_file():
      write_bytes(target / file.relative_to(source).as_posix(), file.read_bytes())
