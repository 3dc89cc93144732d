"""Directories that are made once: by one process, whole, and noticed when damaged.

A finished directory holds `files.json`: what it was made from, and the size and hash of
every file. It appears by one rename, so a process killed half-way leaves nothing that is
later taken for finished.
"""

import contextlib
import fcntl
import hashlib
import json
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from absl import logging

from moe_jax.errors import FieldError

MANIFEST = "files.json"


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
  if fault(directory, key) is None:
    return
  try:
    directory.parent.mkdir(parents=True, exist_ok=True)
    with _lock(directory.parent / f".{directory.name}.lock"):
      reason = fault(directory, key)  # another process may have made it while we waited
      if reason is None:
        return
      partial = directory.with_name(f".{directory.name}.partial")
      shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed
      partial.mkdir()
      build(partial)
      _write_manifest(partial, key)
      if directory.exists():
        logging.warning("%s %s: it is replaced by a new one", directory, reason)
        shutil.rmtree(directory)
      partial.rename(directory)
  except OSError as error:
    raise FieldError("out", str(directory), f"cannot be prepared: {error}") from error
