"""Reads and writes the TFDS dataset of a corpus: array_record files, without TensorFlow.

    <directory>/<name>-{train,heldout}.array_record-00000-of-00004
                dataset_info.json, features.json, metadata.json    TFDS metadata

Each example has `id` and `text`. The order of documents is part of the dataset. Importing this
module imports TFDS, which takes half a second; training on prepared data does not import it.
"""

import os
import pathlib
import re
from collections.abc import Iterator
from typing import NamedTuple

import tensorflow_datasets as tfds
from array_record.python import array_record_module
from tensorflow_datasets.proto import tf_example_generated_pb2

from moe_jax.data import tfds_source

SPLITS = ("train", "heldout")


def features() -> tfds.features.FeaturesDict:
  return tfds.features.FeaturesDict(
      {"id": tfds.features.Text(), "text": tfds.features.Text()})


def tfds_name(corpus: str) -> str:
  """Returns a corpus's name in a form that TFDS accepts: `python-doc` becomes `python_doc`."""
  return re.sub("^(?=[0-9])", "corpus_", re.sub("[^a-z0-9]", "_", corpus))


class Shard(NamedTuple):
  """One file of a dataset.

  Attributes:
    path: the file.
    split: `train` or `heldout`.
    n_documents: how many it holds; never 0.
    n_bytes: its size on disk.
  """

  path: str
  split: str
  n_documents: int
  n_bytes: int


def shard_path(directory: pathlib.Path, name: str, split: str, number: int,
               count: int) -> pathlib.Path:
  return directory / f"{name}-{split}.array_record-{number:05d}-of-{count:05d}"


class ShardWriter:
  """Writes documents to a file atomically: it appears on exit, and not after an error."""

  def __init__(self, path: pathlib.Path):
    self._path = path
    self._partial = path.with_name(f".{path.name}.{os.getpid()}")

  def __enter__(self) -> "ShardWriter":
    self._writer = array_record_module.ArrayRecordWriter(
        str(self._partial), "group_size:1,zstd:1")
    return self

  def write(self, name: str, text: str) -> None:
    example = tf_example_generated_pb2.Example()
    for feature, value in (("id", name), ("text", text)):
      example.features.feature[feature].bytes_list.value.append(value.encode())
    # The bytes of features().serialize_example differ between processes, because protobuf
    # serializes maps in arbitrary order.
    self._writer.write(example.SerializeToString(deterministic=True))

  def __exit__(self, kind, *_) -> None:
    self._writer.close()
    if kind is None:
      self._partial.replace(self._path)
    else:
      self._partial.unlink()


def write_metadata(directory: pathlib.Path, name: str, lengths: dict[str, list[int]],
                   n_bytes: dict[str, int]) -> None:
  """Writes the metadata that makes a directory of shards a TFDS dataset.

  Args:
    directory: the directory of the shards; its name is the dataset's version.
    name: the dataset's name.
    lengths: split -> number of documents in each shard.
    n_bytes: split -> bytes of text.
  """
  template = tfds.core.ShardedFileTemplate(
      data_dir=directory, template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
      dataset_name=name, filetype_suffix="array_record")
  with tfds_source.quiet():
    tfds.folder_dataset.write_metadata(
        data_dir=directory, features=features(), version=directory.name, check_data=False,
        filename_template=template,
        split_infos=[tfds.core.SplitInfo(name=split, shard_lengths=found,
                                         num_bytes=n_bytes[split], filename_template=template)
                     for split, found in lengths.items()])


def list_shards(directory: pathlib.Path, split: str) -> list[Shard]:
  """Returns the non-empty shards of a split, in order."""
  with tfds_source.quiet():
    info = tfds.builder_from_directory(directory).info.splits[split]
  return [Shard(os.fspath(path), split, length, os.path.getsize(path))
          for path, length in zip(info.filepaths, info.shard_lengths, strict=True) if length]


def n_bytes(directory: pathlib.Path, split: str) -> int:
  """Returns the size of a split, roughly that of its text; the same on every machine."""
  with tfds_source.quiet():
    return tfds.builder_from_directory(directory).info.splits[split].num_bytes


def read_shard(shard: Shard) -> Iterator[tuple[str, str]]:
  """Yields (id, text) of each document in order, with one small batch in memory at a time."""
  decoder = features()
  for _, record in tfds_source.records(shard.path, 0, shard.n_documents):
    example = decoder.deserialize_example_np(record)
    yield example["id"].decode(), example["text"].decode()
