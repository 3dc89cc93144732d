"""Reads the documents of one piece of a user's text; raises FieldError for what is not text.

Error messages name the file and the line, row or byte. Memory holds one document at a time, or a
batch of a few hundred rows of Parquet.
"""

import json
from collections.abc import Iterator

from moe_jax.data import sources
from moe_jax.data.sources import Piece, Source
from moe_jax.errors import FieldError, did_you_mean, require

MAX_DOCUMENT_BYTES = 32 * 2**20  # a tokenizer needs about 100x the memory of its text
_MAX_LINE_BYTES = 4 * MAX_DOCUMENT_BYTES  # of JSON: leaves room for escapes and other fields
_BLOCK_BYTES = 2**20
_BATCH_ROWS = 256


def read_piece(piece: Piece, source: Source) -> Iterator[tuple[str, str]]:
  """Yields (name, text) of each document that starts in the piece, empty ones included.

  Raises:
    FieldError: the piece cannot be read or is not valid text; names the place.
  """
  try:
    yield from _READERS[piece.kind](piece, source)
  except (OSError, EOFError) as error:  # also raised for damaged compressed files
    raise FieldError("from", piece.path, f"cannot be read: {error}") from None


def _read_text(piece: Piece, source: Source) -> Iterator[tuple[str, str]]:
  if source.separator is None:
    with sources.open_file(piece.path) as file:
      content = file.read(MAX_DOCUMENT_BYTES + 1)
    if len(content) > MAX_DOCUMENT_BYTES:
      _refuse_size(piece.path, max(len(content), piece.size),
                   ", or give the string between its documents with --separator")
    yield piece.name, _decode(content, piece.path, 0)
    return
  for offset, content in _split(piece, source.separator.encode(), MAX_DOCUMENT_BYTES):
    yield f"{piece.name}@{offset}", _decode(content, piece.path, offset).strip()


def _read_json(piece: Piece, source: Source) -> Iterator[tuple[str, str]]:
  for offset, line in _split(piece, b"\n", _MAX_LINE_BYTES):
    if not line.strip():
      continue
    try:
      value = json.loads(line)
    except (ValueError, RecursionError) as error:  # also raised for bytes that are not UTF-8
      reason = " ".join(str(error).split())
      raise FieldError("from", _line(piece, offset), f"is not JSON: {reason}; each line must be "
                       "a JSON object") from None
    if not isinstance(value, dict):
      raise FieldError("from", _line(piece, offset), "is JSON but not an object with a field "
                       f"{source.text_field!r}")
    if source.text_field not in value:
      raise FieldError("text_field", source.text_field, "is not a field of "
                       f"{_line(piece, offset)}; " + did_you_mean(
                           source.text_field, [str(name) for name in value]))
    text = value[source.text_field]
    if text is not None and not isinstance(text, str):
      raise FieldError("text_field", source.text_field, f"is a {type(text).__name__} in "
                       f"{_line(piece, offset)}; it must be text")
    if not _is_text(text or ""):
      raise FieldError("from", _line(piece, offset), "contains an unpaired surrogate, which "
                       "is not text")
    yield f"{piece.name}@{offset}", text or ""


def _read_parquet(piece: Piece, source: Source) -> Iterator[tuple[str, str]]:
  import pyarrow
  import pyarrow.parquet
  from etils import epath
  row = piece.row
  try:
    with epath.Path(piece.path).open("rb") as opened:
      batches = pyarrow.parquet.ParquetFile(opened).iter_batches(
          _BATCH_ROWS, row_groups=list(range(piece.start, piece.stop)),
          columns=[source.text_field], use_threads=False)
      for batch in batches:
        for text in batch.column(0).to_pylist():
          yield f"{piece.name}:{row}", text or ""
          row += 1
  except (pyarrow.ArrowException, UnicodeDecodeError) as error:
    raise FieldError("from", f"{piece.path}, row {row} or later", "cannot be read: "
                     + " ".join(str(error).split())) from None


def _read_tfds(piece: Piece, source: Source) -> Iterator[tuple[str, str]]:
  from moe_jax.data import tfds_source  # imports TFDS
  for number, content in tfds_source.read(piece, source):
    yield f"{piece.name}:{number}", _decode(content, f"{piece.path}, example {number}", 0)


_READERS = {"text": _read_text, "json": _read_json, "parquet": _read_parquet,
            "tfds": _read_tfds}


def check_size(name: str, size: int) -> None:
  """Raises FieldError if a document is too long to tokenize."""
  if size > MAX_DOCUMENT_BYTES:
    _refuse_size(name, size)


def _refuse_size(name: str, size: int, also: str = "", limit: int = MAX_DOCUMENT_BYTES) -> None:
  raise FieldError("from", name, f"is a document of at least {size:,} bytes; the limit "
                   f"is {limit:,}: split it{also}")


def _decode(content: bytes, path: str, offset: int) -> str:
  zero = content.find(b"\0")
  require(zero < 0, "from", path, f"is binary (byte {offset + zero:,} is zero); it must be UTF-8 "
          "text, JSON lines or Parquet")
  try:
    return content.decode("utf-8-sig")
  except UnicodeDecodeError as error:
    raise FieldError("from", path, f"must be UTF-8 text: byte {offset + error.start:,}, "
                     f"0x{content[error.start]:02x}: {error.reason}") from None


def _is_text(text: str) -> bool:
  try:
    text.encode()
  except UnicodeEncodeError:
    return False
  return True


def _split(piece: Piece, separator: bytes, limit: int) -> Iterator[tuple[int, bytes]]:
  """Splits a file at the separators; yields (offset, content) of parts that start in the piece.

  A part that starts at the piece's stop belongs to the next piece. A compressed file is a single
  piece.
  """
  with sources.open_file(piece.path) as file:
    buffer, base, at = b"", 0, 0  # the buffer's first byte is byte `base` of the file
    if piece.start > 0:  # the first part follows a separator that ends at or after start
      base = max(0, piece.start - len(separator))
      file.seek(base)
    stop = float("inf") if sources.is_compressed(piece.path) else piece.stop
    skipping, ended = piece.start > 0, False
    while True:
      found = buffer.find(separator, at)
      if found < 0 and not ended:
        at = max(at, len(buffer) - len(separator) + 1) if skipping else at
        buffer, base, at = buffer[at:], base + at, 0
        if not skipping and len(buffer) > limit:
          _refuse_size(f"{piece.path}, from byte {base}", len(buffer), limit=limit)
        block = file.read(_BLOCK_BYTES)
        ended, buffer = not block, buffer + block
        continue
      end = len(buffer) if found < 0 else found
      if not skipping and base + at < stop and (end > at or found >= 0):
        yield base + at, buffer[at:end]
      if found < 0 or base + found + len(separator) >= stop:
        return
      at, skipping = found + len(separator), False


def _line(piece: Piece, offset: int) -> str:
  """Returns `file:number` of the line that starts at the offset."""
  number, left = 1, offset
  with sources.open_file(piece.path) as file:
    while left > 0 and (block := file.read(min(_BLOCK_BYTES, left))):
      number += block.count(b"\n")
      left -= len(block)
  return f"{piece.path}:{number}"
