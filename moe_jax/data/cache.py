"""Directories that are made once: by one process, whole, and noticed when damaged.

A finished directory holds `files.json`: what it was made from, and the size and hash of
every file. It appears by one rename, so a process killed half-way leaves nothing that is
later taken for finished. Work that takes long goes on where it was killed: see obtain_in_parts.
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
_KEY = "key.json"  # in a directory that is not finished


def _digest(file: pathlib.Path) -> str:
  with file.open("rb") as opened:
    return hashlib.file_digest(opened, "sha256").hexdigest()


def _write_manifest(directory: pathlib.Path, key: Mapping[str, Any]) -> None:
  files = {str(file.relative_to(directory)): {
      "bytes": file.stat().st_size, "sha256": _digest(file)}
           for file in sorted(directory.rglob("*")) if file.is_file()}
  (directory / MANIFEST).write_text(json.dumps({"key": dict(key), "files": files}, indent=2))


def fault(directory: pathlib.Path, key: Mapping[str, Any]) -> str | None:
  """What is wrong with a finished directory, as a phrase; None if nothing is.

  Reads every file (2 GB/s where the processor has SHA instructions): sizes alone would
  not notice a flipped byte.
  """
  try:
    manifest = json.loads((directory / MANIFEST).read_text())
    made_from, files = manifest["key"], manifest["files"]
    if made_from != dict(key):
      return "was made from something else"
    for name, expected in files.items():
      file = directory / name
      if not file.is_file():
        return f"lacks {name}"
      if file.stat().st_size != expected["bytes"]:
        return f"holds {name} cut or grown: {file.stat().st_size} bytes"
      if _digest(file) != expected["sha256"]:
        return f"holds {name} with changed content"
  except FileNotFoundError:
    return "is not finished"
  except (ValueError, KeyError, TypeError, AttributeError):
    return f"has a damaged {MANIFEST}"
  except OSError as error:
    return f"cannot be read: {error}"
  return None


@contextlib.contextmanager
def _lock(file: pathlib.Path) -> Iterator[None]:
  """Waits for the lock. The kernel drops it when its holder ends, however it ends."""
  with file.open("w") as opened:
    try:
      fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      logging.info("Waiting for another process that prepares %s", file.parent)
      fcntl.flock(opened, fcntl.LOCK_EX)
    yield


def read_json(file: pathlib.Path) -> Any:
  """The content. Raises OSError or ValueError."""
  return json.loads(file.read_text())


def write_whole(file: pathlib.Path, write: Callable[[BinaryIO], Any]) -> None:
  """Calls `write` with an open file that becomes `file` only when all is written.

  Two processes may do so at once: each has a file of its own until then.
  """
  def write_to(path: pathlib.Path) -> None:
    with path.open("wb") as opened:
      write(opened)
  write_path(file, write_to)


def write_path(file: pathlib.Path, write: Callable[[pathlib.Path], Any]) -> None:
  """As write_whole, where `write` wants a path."""
  partial = file.with_name(f".{file.name}.{os.getpid()}")
  write(partial)
  partial.replace(file)


def obtain(directory: pathlib.Path, key: Mapping[str, Any],
           build: Callable[[pathlib.Path], None]) -> None:
  """Sees to it that `directory` is there and whole; many processes may call it at once.

  Args:
    directory: what is to be there.
    key: JSON values that name what it is made from; another key means make it anew.
    build: fills an empty directory. What it makes must depend on `key` alone.

  Raises:
    FieldError: a file cannot be read or written; its field is `out`, the flag that says
      where everything is made.
  """
  def build_anew(partial: pathlib.Path, _: pathlib.Path) -> None:
    shutil.rmtree(partial)  # left by a process that was killed
    partial.mkdir()
    build(partial)
  obtain_in_parts(directory, key, build_anew)


def obtain_in_parts(directory: pathlib.Path, key: Mapping[str, Any],
                    build: Callable[[pathlib.Path, pathlib.Path], None]) -> None:
  """As `obtain`, for work that takes long: `build` finds what a killed attempt left.

  Args:
    directory, key: as there.
    build: gets the directory to fill and one for what is needed only until it is filled.
      Both hold what an earlier attempt with the same key wrote into them. What it takes for
      done must have appeared by one rename (write_whole).
  """
  if fault(directory, key) is None:
    return
  try:
    directory.parent.mkdir(parents=True, exist_ok=True)
    with _lock(directory.parent / f".{directory.name}.lock"):
      reason = fault(directory, key)  # another process may have made it while we waited
      if reason is None:
        return
      partial, scratch = (directory.with_name(f".{directory.name}.{what}")
                          for what in ("partial", "scratch"))
      # What scratch takes for done lies in partial: alone it is what is left behind a rename.
      if not (partial.is_dir() and _is_for(scratch, key)):
        for left in (partial, scratch):
          shutil.rmtree(left, ignore_errors=True)
        scratch.mkdir()
        write_json(scratch / _KEY, dict(key))
      partial.mkdir(exist_ok=True)
      build(partial, scratch)
      for left in partial.rglob(".*"):  # half a file of a process that was killed
        left.unlink()
      _write_manifest(partial, key)
      if directory.exists():
        logging.warning("%s %s: it is replaced by a new one", directory, reason)
        shutil.rmtree(directory)
      partial.rename(directory)
      shutil.rmtree(scratch)
  except OSError as error:
    raise FieldError("out", str(directory), f"cannot be prepared: {error}") from error


def _is_for(scratch: pathlib.Path, key: Mapping[str, Any]) -> bool:
  """Whether a killed attempt at the same thing left this directory."""
  try:
    return read_json(scratch / _KEY) == dict(key)
  except (OSError, ValueError):
    return False
