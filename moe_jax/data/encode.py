"""Tokenizes datasets into token files, shard by shard, in several processes.

A part holds the tokens of one shard of text. Parts are kept until all of them exist, so a killed
preparation can resume; then they are joined in order, with one in memory at a time.
"""

import collections
import hashlib
import io
import math
import pathlib
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from moe_jax.data import cache, pool, tokenizer

_ENCODE_CHARACTERS = 1_000_000  # per call of the tokenizer, which needs a lot of memory per token
_COUNT_TOKENS = 1_000_000


class ShardOf(NamedTuple):
  """A shard of text and the number of the corpus it belongs to."""

  corpus: int
  shard: Any  # dataset.Shard


class Part(NamedTuple):
  """The tokens of one shard of text, on disk.

  Attributes:
    corpus: number of the corpus.
    split: `train` or `heldout`.
    file: an npz file of `tokens` [N], and `lengths` and `bytes` [D]: the numbers of tokens and of
      UTF-8 bytes of each document, int64.
  """

  corpus: int
  split: str
  file: pathlib.Path

  def load(self, name: str) -> np.ndarray:
    with np.load(self.file) as arrays:
      return arrays[name]


def encode(name: str, shards: Sequence[ShardOf], tokenizer_name: str, directory: pathlib.Path,
           scratch: pathlib.Path, processes: int) -> list[Part]:
  """Tokenizes all shards, skipping those with an intact part; returns the parts in order.

  Args:
    name: label of the progress display.
    shards: in the order of the text.
    tokenizer_name: as in `data.tokenizer`.
    directory: directory of the tokenizer's file.
    scratch: directory of the parts.
    processes: number of processes.
  """
  parts = [Part(corpus, shard.split, scratch / f"part-{number:05d}.npz")
           for number, (corpus, shard) in enumerate(shards)]
  for part in parts:
    _remove_damaged(part.file)
  pool.run(f"{name}: tokenizing", _encode_shard, [
      pool.Job(part.file, shard.n_bytes, (shard, tokenizer_name, directory, part.file))
      for part, (_, shard) in zip(parts, shards, strict=True)], processes)
  return parts


def _remove_damaged(file: pathlib.Path) -> None:
  """Removes a part that is damaged, as after a power failure."""
  try:
    if file.exists() and zipfile.ZipFile(file).testzip() is None:
      return
  except (zipfile.BadZipFile, OSError):
    pass
  file.unlink(missing_ok=True)


def _encode_shard(shard: Any, tokenizer_name: str, directory: pathlib.Path,
                  file: pathlib.Path) -> None:
  from moe_jax.data import dataset  # imports TFDS
  encoder = tokenizer.load(tokenizer_name, directory)
  arrays = _encode_texts((text for _, text in dataset.read_shard(shard)), encoder)
  content = io.BytesIO()
  np.savez(content, **arrays)
  cache.write_whole(file, lambda opened: opened.write(content.getbuffer()))


def _encode_texts(texts: Iterable[str], encoder: tokenizer.Tokenizer) -> dict[str, np.ndarray]:
  """Returns the arrays of a part; each document begins with the separator."""
  dtype = np.min_scalar_type(encoder.vocab_size - 1)
  separator = np.array([encoder.document_start_id], dtype)
  documents, sizes = [], []
  for chunk in _chunks(texts):
    sizes += [len(text.encode()) for text in chunk]
    documents += [np.concatenate([separator, ids.astype(dtype)])
                  for ids in encoder.encode_batch(chunk)]
  return {"tokens": np.concatenate(documents),
          "lengths": np.array([len(ids) for ids in documents], np.int64),
          "bytes": np.array(sizes, np.int64)}


def _chunks(texts: Iterable[str]) -> Iterator[list[str]]:
  """Groups texts into lists of about _ENCODE_CHARACTERS characters."""
  chunk: list[str] = []
  characters = 0
  for text in texts:
    chunk.append(text)
    characters += len(text)
    if characters >= _ENCODE_CHARACTERS:
      yield chunk
      chunk, characters = [], 0
  if chunk:
    yield chunk


def join(parts: Sequence[Part], directory: pathlib.Path) -> str:
  """Writes {split}_{tokens,starts,bytes}.npy for each split; returns their fingerprint."""
  digest = hashlib.sha256()
  by_split = collections.defaultdict(list)
  for part in parts:
    by_split[part.split].append(part)
  for split in ("train", "heldout"):
    found = by_split[split]
    n_documents = sum(len(part.load("bytes")) for part in found)
    n_tokens = sum(int(part.load("lengths").sum()) for part in found)
    dtype = found[0].load("tokens").dtype
    for name, arrays, shape, kind, hashed in (
        ("tokens", (part.load("tokens") for part in found), n_tokens, dtype, "<u4"),
        ("starts", _starts(found), n_documents + 1, np.dtype(np.int64), "<i8"),
        ("bytes", (part.load("bytes") for part in found), n_documents, np.dtype(np.int64), "<i8")):
      digest.update(str((shape,)).encode())
      with (directory / f"{split}_{name}.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {
            "descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False,
            "shape": (shape,)})
        for array in arrays:
          for first in range(0, len(array), _COUNT_TOKENS):
            digest.update(array[first:first + _COUNT_TOKENS].astype(hashed).tobytes())
          file.write(array.astype(kind, copy=False).data)
  return digest.hexdigest()[:16]


def _starts(parts: Sequence[Part]) -> Iterator[np.ndarray]:
  """Yields arrays of the offsets at which documents start, and finally the number of tokens."""
  yield np.zeros(1, np.int64)
  total = 0
  for part in parts:
    starts = total + np.cumsum(part.load("lengths"))
    total = int(starts[-1])
    yield starts


def count(parts: Iterable[Part], vocab_size: int) -> "Counts":
  """Returns the counts of consecutive parts."""
  counts_V, n_documents, n_bytes, first = np.zeros(vocab_size, np.int64), 0, 0, None
  for part in parts:
    tokens, sizes = part.load("tokens"), part.load("bytes")
    for start in range(0, len(tokens), _COUNT_TOKENS):  # bincount copies its input to int64
      counts_V += np.bincount(tokens[start:start + _COUNT_TOKENS], minlength=vocab_size)
    first = int(tokens[0]) if first is None else first
    n_documents, n_bytes = n_documents + len(sizes), n_bytes + int(sizes.sum())
  return Counts(counts_V, n_documents, n_bytes, first)


class Counts(NamedTuple):
  """Counts over consecutive documents.

  Attributes:
    counts_V: how often each token occurs.
    n_documents: number of documents.
    n_bytes: UTF-8 bytes of text.
    first: the first token; None if there are no documents.
  """

  counts_V: np.ndarray
  n_documents: int
  n_bytes: int
  first: int | None

  def add(self, other: "Counts") -> "Counts":
    """Returns the counts of these documents followed by the others."""
    return Counts(self.counts_V + other.counts_V, self.n_documents + other.n_documents,
                  self.n_bytes + other.n_bytes, self.first)


def describe(train: Counts, counts: Counts) -> dict[str, Any]:
  """Returns the counts of a split, and the loss of a unigram model on it.

  The model is fitted to `train` with add-one smoothing, so that no token has probability 0. As for
  a language model, its loss is the mean of -log p over all targets (every token but the first): the
  loss of a model that has learned only token frequencies. On the train split this is the unigram
  entropy, up to smoothing. Bits per byte divide the summed loss by the number of bytes.
  """
  smoothed_V = 1 + train.counts_V
  nats_V = math.log(smoothed_V.sum()) - np.log(smoothed_V)
  targets_V = counts.counts_V.copy()
  targets_V[counts.first] -= 1
  nats = float(targets_V @ nats_V)
  return {
      "documents": counts.n_documents, "bytes": counts.n_bytes,
      "tokens": int(counts.counts_V.sum()),
      "unigram_nats_per_token": round(nats / max(int(targets_V.sum()), 1), 6),
      "unigram_bits_per_byte": round(nats / math.log(2) / counts.n_bytes, 6)}
