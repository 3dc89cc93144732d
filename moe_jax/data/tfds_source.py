"""Reads text from an existing TFDS dataset. Importing this module imports TFDS."""

import contextlib
import functools
import io
import os
import pathlib
import tempfile
from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from array_record.python import array_record_module
from etils import epath

from moe_jax.data import sources
from moe_jax.data.sources import Piece, Source
from moe_jax.errors import FieldError, did_you_mean, require
from moe_jax.files import is_local

_BATCH_EXAMPLES = 64


@contextlib.contextmanager
def quiet() -> Iterator[None]:
  """Suppresses logs below WARNING, and what TFDS prints, since stdout is for results."""
  verbosity = logging.get_verbosity()
  logging.set_verbosity(min(verbosity, logging.WARNING))
  try:
    with contextlib.redirect_stdout(io.StringIO()):
      yield
  finally:
    logging.set_verbosity(verbosity)


def find_shards(source: Source) -> list[Piece]:
  """Returns one piece for each array_record file of the split.

  Raises:
    FieldError: there is no such dataset, split or feature (suggests the closest names); the
      dataset is not stored as array_record; or some of its files are missing.
  """
  sources.check_reachable(source.tfds_dir, "tfds_dir")
  builder = _find_builder(source)
  info, where = builder.info, f"of {source.tfds} in {source.tfds_dir}"
  form = info.file_format.value if info.file_format else "unknown"
  require(form == "array_record", "tfds", source.tfds, f"is stored as {form}; array_record is "
          "wanted, which is read without TensorFlow: prepare it with "
          "file_format='array_record'")
  require(source.tfds_split in info.splits, "tfds_split", source.tfds_split,
          f"is not a split {where}; " + did_you_mean(source.tfds_split, list(info.splits)))
  require(source.text_field in info.features, "text_field", source.text_field,
          f"is not a feature {where}; " + did_you_mean(source.text_field, list(info.features)))
  feature = info.features[source.text_field]
  kind = np.dtype(feature.np_dtype)
  require(feature.shape == () and kind.kind in "OSU", "text_field", source.text_field,
          f"is a feature of {kind} with shape {feature.shape} {where}; it must be a single text")
  split = info.splits[source.tfds_split]
  paths = [os.fspath(path) for path in split.filepaths]
  missing = [path for path in paths if not epath.Path(path).exists()]
  require(not missing, "tfds", source.tfds, f"lacks {len(missing)} of the {len(paths)} files of "
          f"its split {source.tfds_split!r}: {missing[:1]}")
  return [Piece(path, os.path.basename(path), "tfds", 0, length, sources.size_of(path))
          for path, length in zip(paths, split.shard_lengths, strict=True)]


def _find_builder(source: Source) -> tfds.core.DatasetBuilder:
  folder = epath.Path(source.tfds_dir)
  require(folder.is_dir(), "tfds_dir", source.tfds_dir, "is not a directory")
  try:
    with quiet():
      return tfds.core.read_only_builder.builder_from_files(source.tfds, data_dir=folder)
  except (ValueError, AssertionError):  # its message may list the whole TFDS catalog
    there = [child.name for child in folder.iterdir() if child.is_dir()]
    near = did_you_mean(source.tfds, there) if there else "the directory holds none"
    raise FieldError("tfds", source.tfds, "no such dataset, version or configuration in "
                     f"{source.tfds_dir}; {near}") from None


@functools.lru_cache(maxsize=8)
def _features(folder: str, text_field: str) -> tfds.features.FeaturesDict:
  """Returns features that decode only the text."""
  found = tfds.features.FeaturesDict.from_config(folder)
  return tfds.features.FeaturesDict({text_field: found[text_field]})


def read(piece: Piece, source: Source) -> Iterator[tuple[int, bytes]]:
  """Yields (index, text) of each example of a piece.

  Raises:
    FieldError: the file is damaged.
  """
  features = _features(os.path.dirname(piece.path), source.text_field)
  with _local(piece.path) as path:
    for number, record in records(path, piece.start, piece.stop):
      yield number, features.deserialize_example_np(record)[source.text_field]


def records(path: str, start: int, stop: int) -> Iterator[tuple[int, bytes]]:
  """Yields (index, content) of each record in a range of an array_record file.

  Raises:
    FieldError: the file is damaged or has fewer records.
  """
  try:
    reader = array_record_module.ArrayRecordReader(path)
    if reader.num_records() < stop:
      raise ValueError(f"it has {reader.num_records()} records, not {stop}")
    for first in range(start, stop, _BATCH_EXAMPLES):
      last = min(first + _BATCH_EXAMPLES, stop)
      yield from zip(range(first, last), reader.read(first, last), strict=True)
    reader.close()
  except (ValueError, RuntimeError, IndexError) as error:
    raise FieldError("from", path, "is damaged or not an array_record file: "
                     + " ".join(str(error).split())) from None


@contextlib.contextmanager
def _local(path: str) -> Iterator[str]:
  """Yields a local path, of a temporary copy if needed: array_record reads only local files."""
  if is_local(path):
    yield path
    return
  with tempfile.TemporaryDirectory() as folder:
    copy = pathlib.Path(folder) / os.path.basename(path)
    epath.Path(path).copy(copy)
    yield str(copy)
