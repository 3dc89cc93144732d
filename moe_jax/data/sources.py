"""Finds the files of a user's text and divides them into units of work.

A unit is what one process reads at a time: several small files, or a part of a large one.
Units depend on the files alone, so any number of processes builds the same corpus.

    *.jsonl, *.ndjson, *.json    one JSON object per line; one of its fields is the text
    *.parquet, *.pq              a column is the text
    any other name               UTF-8 text: one document per file, or several with a separator
    a TFDS dataset               of array_record files; a feature is the text

Text and JSON lines may be compressed (.gz, .bz2, .zst). Paths are local or `gs://`; on `gs://` a
folder or a pattern is not searched recursively.
"""

import dataclasses
import glob
import hashlib
import importlib.util
import json
import os
import pathlib
from collections.abc import Iterable, Iterator
from typing import Literal

from etils import epath

from moe_jax.errors import FieldError, did_you_mean, require
from moe_jax.files import is_local

UNIT_BYTES = 16 * 2**20
_MAX_UNITS = 4096  # approximate upper bound: each unit becomes files of the dataset
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}
_KINDS = {".jsonl": "json", ".ndjson": "json", ".json": "json",
          ".parquet": "parquet", ".pq": "parquet"}


@dataclasses.dataclass(frozen=True)
class Source:
  """The text that a corpus is built from.

  Attributes:
    files: files, folders and glob patterns; empty for TFDS. Local folders are read recursively,
      except for hidden files.
    text_field: JSON field, Parquet column or TFDS feature that holds the text.
    separator: string between the documents of a text file; None if a file is one document.
    tfds: NAME, NAME/CONFIG or NAME:VERSION of a TFDS dataset; None for files.
    tfds_dir: the data_dir that TFDS wrote the dataset to.
    tfds_split: the split to read.
  """

  files: tuple[str, ...] = ()
  text_field: str = "text"
  separator: str | None = None
  tfds: str | None = None
  tfds_dir: str | None = None
  tfds_split: str = "train"

  def __post_init__(self):
    require(bool(self.files) != bool(self.tfds), "from", ",".join(self.files),
            "give either files to read or --tfds=NAME")
    require(self.separator != "", "separator", "", "must not be empty")
    require(not self.tfds or bool(self.tfds_dir), "tfds_dir", self.tfds_dir,
            "is needed with --tfds: the data_dir that TFDS wrote the dataset into")

  @property
  def given(self) -> tuple[str, str]:
    """The flag that names the text, and its value: for error messages."""
    return ("tfds", self.tfds) if self.tfds else ("from", ",".join(self.files))


@dataclasses.dataclass(frozen=True)
class Piece:
  """A part of a file, or all of it.

  Attributes:
    path: path of the file.
    name: short name of the file, the prefix of its documents' names.
    kind: file format.
    start, stop: range of the piece, in bytes of text or JSON lines, row groups of Parquet, or
      examples of array_record.
    size: approximate number of bytes to read.
    row: index of the first row of a Parquet piece.
  """

  path: str
  name: str
  kind: Literal["text", "json", "parquet", "tfds"]
  start: int
  stop: int
  size: int
  row: int = 0


Unit = tuple[Piece, ...]


@dataclasses.dataclass(frozen=True)
class Plan:
  """All units of a source, in order.

  Attributes:
    units: each a tuple of pieces.
    signature: hash of each file's name, size and modification time and of the options for
      reading them; moving a whole folder does not change it.
  """

  units: tuple[Unit, ...]
  signature: str


def make_plan(source: Source) -> Plan:
  """Divides a source into units from file metadata; of the content, reads only Parquet footers.

  Raises:
    FieldError: a file, column, dataset or feature does not exist.
  """
  if source.tfds:
    from moe_jax.data import tfds_source  # imports TFDS
    files = tfds_source.find_shards(source)
  else:
    files = _find_files(source.files)
  unit_bytes = max(UNIT_BYTES, sum(file.size for file in files) // _MAX_UNITS)
  pieces = [piece for file in files for piece in _cut(file, source, unit_bytes)]
  facts = [[file.name, file.kind, file.size, _changed(file.path)] for file in files]
  options = [source.text_field, source.separator, source.tfds, source.tfds_split]
  signature = hashlib.sha256(json.dumps([facts, options]).encode()).hexdigest()[:16]
  return Plan(tuple(_group(pieces, unit_bytes)), signature)


def check_reachable(path: str, field: str) -> None:
  """Raises FieldError if the path is remote and gcsfs is not installed."""
  require(is_local(path) or importlib.util.find_spec("gcsfs") is not None, field, path,
          "needs gcsfs: pip install 'moe_jax[gcs]'")


def open_file(path: str):
  """Opens a file for reading bytes, decompressed if it is compressed."""
  compression = COMPRESSIONS.get(os.path.splitext(path)[1].lower())
  opened = epath.Path(path).open("rb")
  if compression is None:
    return opened
  import pyarrow  # the import takes 0.1 s
  return pyarrow.input_stream(opened, compression=compression)


def is_compressed(path: str) -> bool:
  return os.path.splitext(path)[1].lower() in COMPRESSIONS


def _find_files(patterns: Iterable[str]) -> list[Piece]:
  """Returns one piece for each whole file that the patterns match, sorted by name."""
  found: dict[str, str] = {}  # path -> name
  for pattern in patterns:
    check_reachable(pattern, "from")
    found |= _expand(pattern)
  names = list(found.values())
  if len(set(names)) < len(names):  # files of the same name in two folders
    found = {path: path for path in found}
  sizes = {path: size_of(path) for path in found}
  return [Piece(path, name, _kind(path), 0, sizes[path], sizes[path])
          for path, name in sorted(found.items(), key=lambda item: item[1])]


def _expand(pattern: str) -> dict[str, str]:
  """Maps the path of each file that a pattern matches to its name relative to the folder."""
  if not is_local(pattern):
    return _expand_remote(pattern)
  path = pathlib.Path(pattern).expanduser()
  if path.is_dir():
    root, files = path, [file for file in path.rglob("*") if not any(
        part.startswith(".") for part in file.relative_to(path).parts)]
  elif path.is_file():
    return {str(path): path.name}
  elif glob.has_magic(pattern):
    root = path.parent
    while glob.has_magic(str(root)):
      root = root.parent
    files = [pathlib.Path(file) for file in glob.glob(str(path), recursive=True)]
  else:
    beside = [str(file) for file in path.parent.glob("*")] if path.parent.is_dir() else []
    raise FieldError("from", pattern, "no such file or folder"
                     + ("; " + did_you_mean(str(path), beside) if beside else ""))
  found = {str(file): file.relative_to(root).as_posix() for file in files if file.is_file()}
  require(bool(found), "from", pattern,
          "is an empty folder" if path.is_dir() else "matches no file")
  return found


def _expand_remote(pattern: str) -> dict[str, str]:
  """Like _expand, for the files directly in one folder of an object store."""
  path = epath.Path(pattern)
  if glob.has_magic(path.name):
    files = list(path.parent.glob(path.name))
  elif path.is_dir():
    files = list(path.glob("*"))
  else:
    files = [path]
  found = {os.fspath(file): file.name for file in files if file.exists() and not file.is_dir()}
  require(bool(found), "from", pattern, "names no file that can be read")
  return found


def _kind(path: str) -> str:
  stem, suffix = os.path.splitext(path.lower())
  if suffix in COMPRESSIONS:
    suffix = os.path.splitext(stem)[1]
  return _KINDS.get(suffix, "text")


def size_of(path: str) -> int:
  return os.stat(path).st_size if is_local(path) else epath.Path(path).stat().length


def _changed(path: str) -> int:
  """Modification time of the file."""
  return os.stat(path).st_mtime_ns if is_local(path) else int(epath.Path(path).stat().mtime)


def _cut(file: Piece, source: Source, unit_bytes: int) -> Iterator[Piece]:
  """Cuts a file into pieces; yields a single one if it cannot be read from the middle."""
  if file.kind == "parquet":
    yield from _cut_parquet(file, source, unit_bytes)
    return
  step = whole = max(file.stop, 1)
  if file.kind == "tfds":
    if is_local(file.path):
      step = max(1, file.stop * unit_bytes // max(file.size, 1))
  elif not is_compressed(file.path) and (
      file.kind == "json" or (source.separator and not _overlaps_itself(source.separator))):
    step = unit_bytes
  for start in range(0, whole, step):
    stop = min(start + step, file.stop)
    share = (stop - start) / whole
    yield dataclasses.replace(file, start=start, stop=stop, size=round(file.size * share))


def _overlaps_itself(separator: str) -> bool:
  """Whether a reader that starts inside a file could match the separator at another place."""
  return any(separator.startswith(separator[k:]) for k in range(1, len(separator)))


def _cut_parquet(file: Piece, source: Source, unit_bytes: int) -> Iterator[Piece]:
  import pyarrow
  import pyarrow.parquet
  try:
    with epath.Path(file.path).open("rb") as opened:
      footer = pyarrow.parquet.ParquetFile(opened)
      fields, metadata = footer.schema_arrow, footer.metadata
  except (pyarrow.ArrowException, OSError) as error:
    raise FieldError("from", file.path, "is not a Parquet file that can be read: "
                     + " ".join(str(error).split())) from None
  require(source.text_field in fields.names, "text_field", source.text_field,
          f"is not a column of {file.path}; " + did_you_mean(source.text_field, fields.names))
  kind = fields.field(source.text_field).type
  if pyarrow.types.is_dictionary(kind):
    kind = kind.value_type
  require(pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)
          or pyarrow.types.is_string_view(kind), "text_field",
          source.text_field, f"is a column of {kind} in {file.path}; it must be text (string)")
  start, row, size, first = 0, 0, 0, 0
  for group in range(metadata.num_row_groups):
    size += metadata.row_group(group).total_byte_size
    row += metadata.row_group(group).num_rows
    if size >= unit_bytes or group == metadata.num_row_groups - 1:
      yield dataclasses.replace(file, start=start, stop=group + 1, size=size, row=first)
      start, first, size = group + 1, row, 0


def _group(pieces: Iterable[Piece], unit_bytes: int) -> Iterator[Unit]:
  """Groups consecutive pieces into units of at most unit_bytes, or of one larger piece."""
  unit: list[Piece] = []
  size = 0
  for piece in pieces:
    if unit and size + piece.size > unit_bytes:
      yield tuple(unit)
      unit, size = [], 0
    unit.append(piece)
    size += piece.size
  if unit:
    yield tuple(unit)
