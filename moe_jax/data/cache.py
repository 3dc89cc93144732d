"""Builds directories once: by a single process, atomically, and again if they are damaged.

A finished directory holds `files.json`: the key it was built from, and the size and hash of
every file. It appears by a single rename, so a process killed half-way leaves nothing that could
later pass for finished. Long builds resume where they were killed: see obtain_in_parts.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

from absl import logging

from moe_jax.errors import FieldError
from moe_jax.files import write_json

MANIFEST = "files.json"
_KEY = "key.json"  # in the scratch directory of an unfinished build


def _digest(file: pathlib.Path) -> str:
  with file.open("rb") as opened:
    return hashlib.file_digest(opened, "sha256").hexdigest()


def _write_manifest(directory: pathlib.Path, key: Mapping[str, Any]) -> None:
  files = {str(file.relative_to(directory)): {
      "bytes": file.stat().st_size, "sha256": _digest(file)}
           for file in sorted(directory.rglob("*")) if file.is_file()}
  (directory / MANIFEST).write_text(json.dumps({"key": dict(key), "files": files}, indent=2))


def fault(directory: pathlib.Path, key: Mapping[str, Any]) -> str | None:
  """Returns what is wrong with a directory, as a phrase, or None if it is finished and intact.

  Reads every file (2 GB/s where the processor has SHA instructions): sizes alone would
  not reveal a flipped byte.
  """
  try:
    manifest = json.loads((directory / MANIFEST).read_text())
    made_from, files = manifest["key"], manifest["files"]
    if made_from != dict(key):
      return "was built from different inputs"
    for name, expected in files.items():
      file = directory / name
      if not file.is_file():
        return f"is missing {name}"
      if file.stat().st_size != expected["bytes"]:
        return f"has {name} with the wrong size: {file.stat().st_size} bytes"
      if _digest(file) != expected["sha256"]:
        return f"has {name} with changed content"
  except FileNotFoundError:
    return "is not finished"
  except (ValueError, KeyError, TypeError, AttributeError):
    return f"has a damaged {MANIFEST}"
  except OSError as error:
    return f"cannot be read: {error}"
  return None


@contextlib.contextmanager
def _lock(file: pathlib.Path) -> Iterator[None]:
  """Waits for the lock and holds it. The kernel releases it even if the holder is killed."""
  with file.open("w") as opened:
    try:
      fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      logging.info("Waiting for another process that is preparing %s", file.parent)
      fcntl.flock(opened, fcntl.LOCK_EX)
    yield


def read_json(file: pathlib.Path) -> Any:
  """Reads a JSON file. Raises OSError or ValueError."""
  return json.loads(file.read_text())


def write_whole(file: pathlib.Path, write: Callable[[BinaryIO], Any]) -> None:
  """Writes a file atomically: `write` fills a temporary file, which is then renamed to `file`.

  Two processes may do so at once: each has its own temporary file.
  """
  def write_to(path: pathlib.Path) -> None:
    with path.open("wb") as opened:
      write(opened)
  write_path(file, write_to)


def write_path(file: pathlib.Path, write: Callable[[pathlib.Path], Any]) -> None:
  """Like write_whole, for a `write` that takes a path."""
  partial = file.with_name(f".{file.name}.{os.getpid()}")
  write(partial)
  partial.replace(file)


def obtain(directory: pathlib.Path, key: Mapping[str, Any],
           build: Callable[[pathlib.Path], None]) -> None:
  """Ensures that `directory` exists and is intact; many processes may call it at once.

  Args:
    directory: the directory to build if it is missing, damaged or built from another key.
    key: JSON values that identify what it is built from.
    build: fills an empty directory. The result must depend on `key` alone.

  Raises:
    FieldError: a file cannot be read or written; its field is `out`, the flag that sets
      where all output goes.
  """
  def build_anew(partial: pathlib.Path, _: pathlib.Path) -> None:
    shutil.rmtree(partial)  # may hold what a killed process left
    partial.mkdir()
    build(partial)
  obtain_in_parts(directory, key, build_anew)


def obtain_in_parts(directory: pathlib.Path, key: Mapping[str, Any],
                    build: Callable[[pathlib.Path, pathlib.Path], None]) -> None:
  """Like `obtain`, for long builds: `build` can resume from what a killed attempt left.

  Args:
    directory, key: as in `obtain`.
    build: gets the directory to fill and a scratch directory, which is removed afterwards.
      Both hold whatever an earlier attempt with the same key wrote into them. Any file that
      `build` reuses must have been written atomically (write_whole).
  """
  if fault(directory, key) is None:
    return
  try:
    directory.parent.mkdir(parents=True, exist_ok=True)
    with _lock(directory.parent / f".{directory.name}.lock"):
      reason = fault(directory, key)  # another process may have built it while we waited
      if reason is None:
        return
      partial, scratch = (directory.with_name(f".{directory.name}.{what}")
                          for what in ("partial", "scratch"))
      # Files in scratch mark work whose results are in partial. If scratch is alone, a process was
      # killed after the rename below.
      if not (partial.is_dir() and _is_for(scratch, key)):
        for left in (partial, scratch):
          shutil.rmtree(left, ignore_errors=True)
        scratch.mkdir()
        write_json(scratch / _KEY, dict(key))
      partial.mkdir(exist_ok=True)
      build(partial, scratch)
      for left in partial.rglob(".*"):  # temporary files of killed processes
        left.unlink()
      _write_manifest(partial, key)
      if directory.exists():
        logging.warning("%s %s: rebuilding it", directory, reason)
        shutil.rmtree(directory)
      partial.rename(directory)
      shutil.rmtree(scratch)
  except OSError as error:
    raise FieldError("out", str(directory), f"cannot be prepared: {error}") from error


def _is_for(scratch: pathlib.Path, key: Mapping[str, Any]) -> bool:
  """Returns whether an attempt with the same key left this scratch directory."""
  try:
    return read_json(scratch / _KEY) == dict(key)
  except (OSError, ValueError):
    return False
