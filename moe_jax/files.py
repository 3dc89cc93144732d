"""Reads and writes whole files, on a disk or an object store. No JAX.

An object store supports neither append nor atomic rename.
"""

import contextlib
import csv
import io
import json
import os
import pathlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from etils import epath

from moe_jax.errors import DamagedFile, FieldError
from moe_jax.fields import from_json

T = TypeVar("T")

# gcsfs would cache directory listings and miss files that other machines write.
os.environ.setdefault("FSSPEC_GCS", '{"use_listings_cache": false}')

_STORES = ("aiohttp", "fsspec", "gcsfs", "google", "tensorflow")  # their errors are not OSErrors


def is_local(path: str | os.PathLike) -> bool:
  return "://" not in os.fspath(path)


def absolute(path: str) -> str:
  """The path, valid in any working directory; that of an object store is returned unchanged."""
  return os.path.abspath(path) if is_local(path) else path


def files_below(folder: epath.Path) -> Iterator[epath.Path]:
  """All files below a folder, at any depth."""
  scheme, remote, _ = os.fspath(folder).partition("://")
  for root, _, names in folder.walk():
    # For an object store, etils yields paths without the scheme.
    home = epath.Path(f"{scheme}://{root}") if remote and is_local(root) else root
    yield from (home / name for name in names)


def write_text(path: epath.Path, text: str) -> None:
  """Writes a whole file, in UTF-8; see write_bytes."""
  write_bytes(path, text.encode())


def write_bytes(path: epath.Path | pathlib.Path, content: bytes) -> None:
  """Writes a whole file atomically: a reader sees the old content or the new, never a part."""
  path.parent.mkdir(parents=True, exist_ok=True)
  if not is_local(path):  # an object only appears once its upload is complete
    path.write_bytes(content)
    return
  # A heartbeat thread may write the same file, so each writer needs its own partial file.
  partial = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.partial")
  try:
    partial.write_bytes(content)
    partial.replace(path)
  except OSError as error:
    raise OSError(error.errno, f"{path} cannot be written: {error.strerror}") from None
  finally:
    partial.unlink(missing_ok=True)  # it still exists only after an error


def write_json(path: epath.Path | pathlib.Path, value: Any) -> None:
  write_text(path, json.dumps(value, indent=2) + "\n")


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
  """Formats rows as CSV; None and columns missing from a row become empty fields."""
  columns = dict.fromkeys(name for row in rows for name in row)
  text = io.StringIO()
  writer = csv.DictWriter(text, list(columns), lineterminator="\n")
  writer.writeheader()
  writer.writerows(rows)
  return text.getvalue()


def read_json(path: epath.Path) -> Any:
  """The content, or None if there is no file. Raises DamagedFile if it is not JSON."""
  if not path.exists():
    return None
  try:
    return json.loads(path.read_text())
  except (json.JSONDecodeError, UnicodeDecodeError) as error:
    raise DamagedFile("out", str(path), f"is damaged, not JSON: {error}") from None
  except IsADirectoryError:
    raise DamagedFile("out", str(path), "is damaged: a directory where a file belongs") from None


def read_as(cls: type[T], path: epath.Path) -> T | None:
  """The content as a flat dataclass, or None if there is no file. Raises DamagedFile."""
  stored = read_json(path)
  try:
    return None if stored is None else from_json(cls, stored)
  except FieldError as error:
    raise DamagedFile("out", str(path), f"is damaged: {error}") from None


def is_of_storage(error: Exception) -> bool:
  """Whether a file system or an object store raised `error`, rather than a bug of this program."""
  return isinstance(error, OSError) or any(
      cls.__module__.partition(".")[0] in _STORES for cls in type(error).__mro__)


@contextlib.contextmanager
def reaching(path: str | os.PathLike) -> Iterator[None]:
  """Turns storage errors raised within the context into a FieldError of one line."""
  try:
    yield
  except (FieldError, BrokenPipeError):  # the pipe is standard output
    raise
  except Exception as error:
    if not is_of_storage(error):
      raise
    raise FieldError("out", os.fspath(path),
                     f"cannot be read or written: {' '.join(str(error).split())}") from None
