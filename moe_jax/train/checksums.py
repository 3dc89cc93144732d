"""SHA-256 checksums for the files of a checkpoint: Orbax does not detect a flipped byte."""

import hashlib
from collections.abc import Sequence
from concurrent import futures

from etils import epath

from moe_jax.errors import FieldError
from moe_jax.files import files_below, read_json, write_json

_THREADS = 8  # hashing and reading release the GIL; on an object store reads overlap

# Orbax writes these two into the step's root on commit, after the checksums have been computed.
# They contain the time of the commit and nothing that is ever read here.
_COMMIT_MARKS = frozenset({"_CHECKPOINT_METADATA", "commit_success.txt"})


def record(step_dir: epath.Path, file: epath.Path) -> None:
  """Writes the size and hash of every file below `step_dir` to `file`, as JSON."""
  names = _names(step_dir)
  with futures.ThreadPoolExecutor(_THREADS) as pool:
    entries = pool.map(lambda name: _entry(step_dir / name), names)
  write_json(file, dict(zip(names, entries, strict=True)))


def damage(step_dir: epath.Path, file: epath.Path,
           items: Sequence[str] | None = None) -> str | None:
  """What is wrong with the checkpoint at `step_dir`, as a phrase; None if it is sound.

  Args:
    step_dir: a finished checkpoint.
    file: the checksums that `record` wrote for it.
    items: folders of the checkpoint to check; None means all of it.
  """
  try:
    listed = read_json(file)
  except FieldError:
    return "its list of checksums is damaged"
  if listed is None:
    return "it has no checksums"
  if not isinstance(listed, dict):
    return "its list of checksums is damaged"
  listed = {name: entry for name, entry in listed.items() if _wanted(name, items)}
  present = [name for name in _names(step_dir) if _wanted(name, items)]
  for name in sorted(set(listed) ^ set(present)):
    return f"{name} is missing" if name in listed else f"{name} has no checksum"
  with futures.ThreadPoolExecutor(_THREADS) as pool:
    entries = pool.map(lambda name: _entry(step_dir / name), present)
  for name, entry in zip(present, entries, strict=True):
    if entry != listed[name]:
      return f"{name} does not match its checksum"
  return None


def _names(step_dir: epath.Path) -> list[str]:
  """Sorted paths of the files below `step_dir`, relative to it, without the commit marks."""
  names = (file.relative_to(step_dir).as_posix() for file in
           files_below(step_dir))
  return sorted(name for name in names if name not in _COMMIT_MARKS)


def _wanted(name: str, items: Sequence[str] | None) -> bool:
  return items is None or name.partition("/")[0] in items


def _entry(path: epath.Path) -> dict[str, int | str]:
  with path.open("rb") as file:
    digest = hashlib.file_digest(file, "sha256")
  return {"bytes": path.stat().length, "sha256": digest.hexdigest()}
