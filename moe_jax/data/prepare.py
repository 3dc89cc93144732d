"""Corpus and tokenizer -> flat token files with document boundaries, made once.

    <data_dir>/<corpus>/dataset/                the TFDS dataset (a TFDS data_dir)
    <data_dir>/<corpus>/<tokenizer>/card.json   what is there: counts, entropies, fingerprint
                                    tokenizer.json            (bpe-N alone)
                                    {train,heldout}_{tokens,starts,bytes}.npy

A document's tokens are the separator and the tokens of its text. Where everything is there
already, `prepare` only checks it: no TFDS, no tokenizer library, some milliseconds.
"""

import dataclasses
import functools
import hashlib
import json
import math
import os
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from absl import logging

from moe_jax.config import DataConfig
from moe_jax.data import cache, corpus, tokenizer
from moe_jax.errors import require

FORMAT_VERSION = 1  # raise it when the same corpus and tokenizer give other files
SPLITS = ("train", "heldout")
_ENCODE_CHARACTERS = 1_000_000  # texts tokenised at once: a token is large while it is made


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
  """The documents of a split, one after another.

  Attributes:
    tokens_N: token ids, a read-only memory map of an unsigned type.
    starts_D1: int64; document d is tokens_N[starts_D1[d] : starts_D1[d + 1]].
    bytes_D: int64; UTF-8 bytes of each document's text.
  """

  tokens_N: np.ndarray
  starts_D1: np.ndarray
  bytes_D: np.ndarray

  @property
  def n_tokens(self) -> int:
    return len(self.tokens_N)

  @property
  def n_documents(self) -> int:
    return len(self.bytes_D)

  @property
  def n_bytes(self) -> int:
    return int(self.bytes_D.sum())


@dataclasses.dataclass(frozen=True, eq=False)
class PreparedData:
  """A corpus in tokens.

  Attributes:
    directory: where its files are.
    card: content of card.json.
    splits: `train` and `heldout`.
  """

  directory: pathlib.Path
  card: dict[str, Any]
  splits: dict[str, Split]

  @property
  def fingerprint(self) -> str:
    """Names the tokens of both splits; equal on every machine that prepared the same."""
    return self.card["fingerprint"]

  @property
  def vocab_size(self) -> int:
    return self.card["vocab_size"]

  @property
  def document_start_id(self) -> int:
    return self.card["document_start_id"]

  @functools.cached_property
  def tokenizer(self) -> tokenizer.Tokenizer:
    return _load_tokenizer(self.card["tokenizer"], self.directory)


def prepare(data: DataConfig, data_dir: str | os.PathLike) -> PreparedData:
  """Builds what is missing or damaged, and opens it.

  Any number of processes may call it at once: one builds, the others wait.

  Args:
    data: `corpus` and `tokenizer` are used.
    data_dir: a local directory that any number of runs share: <out>/_data.

  Raises:
    FieldError: `data.corpus` is unknown or empty; or `out`, the flag that places
      `data_dir`, gives a remote path or one that cannot be written.
  """
  found = corpus.get_corpus(data.corpus)
  require("://" not in os.fspath(data_dir), "out", os.fspath(data_dir),
          "must be a local path for now: prepared data lie in <out>/_data and are read by "
          "memory map")
  home = pathlib.Path(data_dir) / found.name
  directory = home / data.tokenizer
  key = {"format": FORMAT_VERSION, "corpus": found.name, "version": found.version,
         **corpus.selection()}

  def build_tokens(partial: pathlib.Path) -> None:
    from moe_jax.data import builder  # imports TFDS: only where there is work to do
    logging.info("Preparing %s with tokenizer %s in %s", found.name, data.tokenizer, home)
    dataset = home / "dataset"
    cache.obtain(dataset, key, functools.partial(builder.build, found))
    _build_tokens(data, found, dataset, partial)

  cache.obtain(directory, key | {"tokenizer": data.tokenizer}, build_tokens)
  return _open(directory)


def _open(directory: pathlib.Path) -> PreparedData:
  splits = {name: Split(*(np.load(directory / f"{name}_{part}.npy", mmap_mode=mode)
                          for part, mode in (("tokens", "r"), ("starts", None),
                                             ("bytes", None))))
            for name in SPLITS}
  card = json.loads((directory / "card.json").read_text())
  return PreparedData(directory, card, splits)


def _load_tokenizer(name: str, directory: pathlib.Path) -> tokenizer.Tokenizer:
  if name == "bytes":
    return tokenizer.ByteTokenizer()
  return tokenizer.BpeTokenizer(directory / "tokenizer.json")


def _build_tokens(data: DataConfig, found: corpus.Corpus, dataset: pathlib.Path,
                  directory: pathlib.Path) -> None:
  """Tokenises the dataset into `directory` and describes it in card.json."""
  from moe_jax.data import builder

  def texts(split: str) -> Iterator[str]:
    return (text for _, text in builder.read(found, dataset, split))

  if data.tokenizer != "bytes":
    tokenizer.train_bpe(texts("train"), data.tokenizer_vocab_size,
                        directory / "tokenizer.json")
  encoder = _load_tokenizer(data.tokenizer, directory)
  require(encoder.vocab_size <= data.tokenizer_vocab_size, "data.tokenizer",
          data.tokenizer, f"was trained to {encoder.vocab_size} tokens, more than it says")
  splits = {name: _encode_split(texts(name), encoder) for name in SPLITS}
  for name, split in splits.items():
    np.save(directory / f"{name}_tokens.npy", split.tokens_N)
    np.save(directory / f"{name}_starts.npy", split.starts_D1)
    np.save(directory / f"{name}_bytes.npy", split.bytes_D)
  card = {
      "corpus": found.name, "corpus_version": found.version, "tokenizer": data.tokenizer,
      "vocab_size": encoder.vocab_size, "document_start_id": encoder.document_start_id,
      "fingerprint": _fingerprint(splits.values()),
      "splits": _describe(splits, encoder.vocab_size),
      "duplicates": builder.read_duplicates(found, dataset),
      "homepage": found.homepage, "license": found.license}
  (directory / "card.json").write_text(json.dumps(card, indent=2) + "\n")


def _chunks(texts: Iterable[str]) -> Iterator[list[str]]:
  """Groups texts into lists of about _ENCODE_CHARACTERS characters."""
  chunk: list[str] = []
  for text in texts:
    chunk.append(text)
    if sum(map(len, chunk)) >= _ENCODE_CHARACTERS:
      yield chunk
      chunk = []
  if chunk:
    yield chunk


def _encode_split(texts: Iterable[str], encoder: tokenizer.Tokenizer) -> Split:
  """Tokenises documents into one stream; each begins with the separator."""
  dtype = np.min_scalar_type(encoder.vocab_size - 1)
  separator = np.array([encoder.document_start_id], dtype)
  documents, sizes = [], []
  for chunk in _chunks(texts):
    sizes += [len(text.encode()) for text in chunk]
    documents += [np.concatenate([separator, ids.astype(dtype)])
                  for ids in encoder.encode_batch(chunk)]
  starts_D1 = np.cumsum([0, *map(len, documents)], dtype=np.int64)
  return Split(np.concatenate(documents), starts_D1, np.array(sizes, np.int64))


def _fingerprint(splits: Iterable[Split]) -> str:
  digest = hashlib.sha256()
  for split in splits:
    for array in (split.tokens_N.astype("<u4"), split.starts_D1, split.bytes_D):
      digest.update(str(array.shape).encode() + array.tobytes())
  return digest.hexdigest()[:16]


def _describe(splits: dict[str, Split], vocab_size: int) -> dict[str, dict[str, Any]]:
  """Counts of each split, and the loss of a unigram model on it.

  The model is fitted to the train split, one added to each token's count so that none has
  probability 0. Its loss is the mean of -log p over all targets (every token but the
  first), as a language model's loss is; a model that learned nothing but how frequent
  tokens are has this loss. Bits per byte spread the sum of it over the text's bytes.
  """
  counts_V = 1 + np.bincount(splits["train"].tokens_N, minlength=vocab_size)
  nats_V = math.log(counts_V.sum()) - np.log(counts_V)
  described = {}
  for name, split in splits.items():
    targets = split.n_tokens - 1
    nats = float(np.bincount(split.tokens_N[1:], minlength=vocab_size) @ nats_V)
    described[name] = {
        "documents": split.n_documents, "bytes": split.n_bytes, "tokens": split.n_tokens,
        "unigram_nats_per_token": round(nats / targets, 6),
        "unigram_bits_per_byte": round(nats / math.log(2) / split.n_bytes, 6)}
  return described
