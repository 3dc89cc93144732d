"""Tokenizes corpora into flat token files with document boundaries, once per tokenizer.

    <data_dir>/<corpus>/dataset/                the TFDS dataset
    <data_dir>/<corpus>/<tokenizer>/card.json   description: counts, entropies, fingerprint
                                    tokenizer.json            (not for `bytes`)
                                    {train,heldout}_{tokens,starts,bytes}.npy
    <data_dir>/<corpus>+<corpus>/<tokenizer>/   the same for a mixture, its corpora in sequence

A document's tokens are the separator followed by the tokens of its text. The weights of a mixture
decide how its files are sampled, not what they contain. If everything exists already, `prepare`
only verifies it: it hashes every file, at about 2 GB/s, and imports neither TFDS nor the tokenizer
library.
"""

import dataclasses
import functools
import itertools
import json
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from absl import logging

from moe_jax.config import DataConfig
from moe_jax.data import cache, corpus, encode, mirror, pool, tokenizer
from moe_jax.data.progress import Progress
from moe_jax.errors import require
from moe_jax.files import write_json

SPLITS = ("train", "heldout")
_BPE_BYTES = 256_000_000  # of text to train a BPE on; more text changes no merge that matters


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
  """The documents of a split, concatenated.

  Attributes:
    tokens_N: token ids, a read-only memory map of an unsigned type.
    starts_D1: int64; document d is tokens_N[starts_D1[d] : starts_D1[d + 1]].
    bytes_D: int64; size of each document's text in UTF-8 bytes.
    domain_starts: index of the first document of each domain (PreparedData.domains).
  """

  tokens_N: np.ndarray
  starts_D1: np.ndarray
  bytes_D: np.ndarray
  domain_starts: tuple[int, ...] = (0,)

  @property
  def n_tokens(self) -> int:
    return len(self.tokens_N)

  @property
  def n_documents(self) -> int:
    return len(self.bytes_D)

  @property
  def n_bytes(self) -> int:
    return int(self.bytes_D.sum())

  @property
  def domain_D(self) -> np.ndarray:
    """Index of each document's domain, int64 [D]; a batch's segment ids index into it."""
    ends = (*self.domain_starts[1:], self.n_documents)
    return np.repeat(np.arange(len(ends)), np.diff(self.domain_starts, append=ends[-1]))

  def domain_tokens(self, domain: int) -> range:
    """Returns the range of tokens_N that a domain occupies."""
    first, last = (*self.domain_starts, self.n_documents)[domain:domain + 2]
    return range(int(self.starts_D1[first]), int(self.starts_D1[last]))


@dataclasses.dataclass(frozen=True)
class Domain:
  """One corpus of a mixture.

  Attributes:
    corpus: name of the corpus.
    label: name under which its losses are reported; several corpora may share one.
    weight: its share of the training rows.
  """

  corpus: str
  label: str
  weight: float


@dataclasses.dataclass(frozen=True, eq=False)
class PreparedData:
  """A tokenized corpus, or a mixture of several.

  Attributes:
    directory: the directory of its files.
    card: content of card.json.
    splits: `train` and `heldout`.
    domains: the corpora, in the order of their documents.
  """

  directory: pathlib.Path
  card: dict[str, Any]
  splits: dict[str, Split]
  domains: tuple[Domain, ...] = ()

  @property
  def fingerprint(self) -> str:
    """Hash of the tokens of both splits; identical data have the same one on every machine."""
    return self.card["fingerprint"]

  @property
  def vocab_size(self) -> int:
    return self.card["vocab_size"]

  @property
  def document_start_id(self) -> int:
    return self.card["document_start_id"]

  @functools.cached_property
  def tokenizer(self) -> tokenizer.Tokenizer:
    return tokenizer.load(self.card["tokenizer"], self.directory)


def prepare(data: DataConfig, data_dir: str | os.PathLike,
            processes: int | None = None) -> PreparedData:
  """Opens the prepared data, after building whatever is missing or damaged.

  Any number of processes may call it at once: one builds, the others wait. If the builder is
  killed, the next call resumes its work.

  Args:
    data: only `corpus` and `tokenizer` are used.
    data_dir: <out>/_data, a directory shared by any number of runs; see mirror.py.
    processes: number of processes that tokenize; one per available core if None.

  Raises:
    FieldError: `data.corpus` is unknown or empty, `data.tokenizer` does not exist, or `data_dir`
      cannot be written (reported as `out`, the flag that determines it).
  """
  root = mirror.fetch(data_dir, [tokenizer.ADDED, *(
      f"{name}/dataset" for name in data.mixture if name not in corpus.CORPORA)])
  corpora = [corpus.get_corpus(name, root) for name in data.mixture]
  directory = root / "+".join(found.name for found in corpora) / data.tokenizer
  key = {"format": corpus.FORMAT_VERSION, "tokenizer": data.tokenizer,
         **(corpora[0].key if len(corpora) == 1 else {"corpora": [c.key for c in corpora]})}
  build = functools.partial(_build, data.tokenizer, corpora, root,
                            processes or pool.default_processes())
  cache.obtain_in_parts(directory, key, build)
  return _open(directory, data.mixture)


def _open(directory: pathlib.Path, shares: dict[str, float]) -> PreparedData:
  card = json.loads((directory / "card.json").read_text())
  # Cards from before mixtures existed have no `domains` and describe a single corpus.
  described = card.get("domains", [{"corpus": name, "label": name} for name in shares])
  splits = {}
  for name in SPLITS:
    documents = [domain["splits"][name]["documents"] for domain in described[:-1]]
    splits[name] = Split(*(np.load(directory / f"{name}_{part}.npy", mmap_mode="r")
                           for part in ("tokens", "starts", "bytes")),
                         domain_starts=tuple(itertools.accumulate(documents, initial=0)))
  domains = tuple(Domain(domain["corpus"], domain["label"], shares[domain["corpus"]])
                  for domain in described)
  return PreparedData(directory, card, splits, domains)


def _build(tokenizer_name: str, corpora: Sequence[corpus.Corpus | corpus.AddedCorpus],
           root: pathlib.Path, processes: int, directory: pathlib.Path,
           scratch: pathlib.Path) -> None:
  """Tokenizes the datasets into `directory` and writes card.json."""
  from moe_jax.data import dataset  # imports TFDS, so only when there is something to build
  name, file = "+".join(found.name for found in corpora), scratch / tokenizer.FILE
  size = DataConfig(tokenizer=tokenizer_name).tokenizer_vocab_size
  trained = tokenizer_name == f"bpe-{size}" and not file.exists()
  if not trained:
    tokenizer.fetch(tokenizer_name, root, file)  # fails early if it does not exist
  logging.info("Preparing %s with tokenizer %s in %s", name, tokenizer_name, root / name)
  homes = [found.obtain(root / found.name) for found in corpora]
  shards = [encode.ShardOf(number, shard) for split in SPLITS
            for number, home in enumerate(homes) for shard in dataset.list_shards(home, split)]
  if trained:
    n_bytes = sum(dataset.n_bytes(home, "train") for home in homes)
    _train(size, shards, n_bytes, file)
  encoder = tokenizer.load(tokenizer_name, scratch)
  require(size is None or encoder.vocab_size <= size, "data.tokenizer",
          tokenizer_name, f"has {encoder.vocab_size} tokens, more than its name says")
  if isinstance(encoder, tokenizer.FileTokenizer):
    if not encoder.is_lossless:
      logging.warning("The tokenizer %s does not give every text back unchanged: what it loses "
                      "is missing from losses in bits per byte", tokenizer_name)
    (directory / tokenizer.FILE).write_bytes(file.read_bytes())
  parts = encode.encode(name, shards, tokenizer_name, scratch, scratch, processes)
  fingerprint = encode.join(parts, directory)
  counts = [{split: encode.count([part for part in parts if part.split == split
                                  and part.corpus == number], encoder.vocab_size)
             for split in SPLITS} for number in range(len(corpora))]
  both = {split: functools.reduce(encode.Counts.add, [found[split] for found in counts])
          for split in SPLITS}
  write_json(directory / "card.json", {
      "corpus": name, "tokenizer": tokenizer_name,
      "vocab_size": encoder.vocab_size, "document_start_id": encoder.document_start_id,
      "fingerprint": fingerprint,
      "splits": {split: encode.describe(both["train"], both[split]) for split in SPLITS},
      "domains": [_describe_domain(found, home, of_domain)
                  for found, home, of_domain in zip(corpora, homes, counts, strict=True)]})


def _train(size: int, shards: Sequence[encode.ShardOf], n_bytes: int,
           file: pathlib.Path) -> None:
  """Trains a BPE on the train splits of all corpora."""
  with Progress(f"training bpe-{size}", min(n_bytes, _BPE_BYTES)) as progress:
    texts = _sample(shards, -(-n_bytes // _BPE_BYTES), progress)
    cache.write_path(file, lambda path: tokenizer.train_bpe(texts, size, path))


def _sample(shards: Sequence[encode.ShardOf], every: int, progress: Progress) -> Iterator[str]:
  """Yields every `every`-th text of the train splits, so that the sample covers all of them."""
  from moe_jax.data import dataset
  texts = (text for _, shard in shards if shard.split == "train"
           for _, text in dataset.read_shard(shard))
  for text in itertools.islice(texts, 0, None, max(every, 1)):
    yield text
    progress.advance(len(text.encode()))


def _describe_domain(found: corpus.Corpus | corpus.AddedCorpus, home: pathlib.Path,
                     counts: dict[str, encode.Counts]) -> dict[str, Any]:
  return {"corpus": found.name, "label": found.label,
          "splits": {split: encode.describe(counts["train"], counts[split])
                     for split in SPLITS},
          **found.origin(home)}
