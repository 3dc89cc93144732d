"""Removes near-duplicates from a corpus that fits in memory, and holds out some documents."""

import collections
import dataclasses
import hashlib
import re
from collections.abc import Sequence

import numpy as np

from moe_jax.errors import require

HELDOUT_FRACTION = 0.05
SHINGLE_WORDS = 8
DUPLICATE_SHARE = 0.5


def selection() -> dict[str, float]:
  """Returns the settings that select and split documents; data prepared with others is stale."""
  return {"heldout_fraction": HELDOUT_FRACTION, "shingle_words": SHINGLE_WORDS,
          "duplicate_share": DUPLICATE_SHARE}


@dataclasses.dataclass(frozen=True)
class Document:
  """A document of a corpus.

  Attributes:
    id: its name, unique in the corpus.
    text: the text that is trained on.
    work: the work of which it is a version or a part. Documents of one work share passages, so
      they all go to the same split.
  """

  id: str
  text: str
  work: str


@dataclasses.dataclass(frozen=True)
class Duplicate:
  """A dropped document: a fraction `share` of its shingles occurs in the document `of`."""

  id: str
  of: str
  share: float


def _shingles(words: Sequence[str], word_ids: dict[str, int]) -> np.ndarray:
  """Returns the distinct hashes of all runs of SHINGLE_WORDS words, uint64 [N].

  A shorter text counts as a single run.
  """
  ids_W = np.array([word_ids.setdefault(word, len(word_ids) + 1) for word in words],
                   np.uint64)
  length = min(SHINGLE_WORDS, len(words))
  # A polynomial hash modulo 2^64: NumPy integers wrap, and an odd multiplier loses no bits.
  powers = np.cumprod(np.full(length, 6364136223846793005, np.uint64), dtype=np.uint64)
  windows = np.lib.stride_tricks.sliding_window_view(ids_W, length)
  return np.unique((windows * powers).sum(axis=1, dtype=np.uint64))


def deduplicate(documents: Sequence[Document]) -> tuple[list[Document], list[Duplicate]]:
  """Drops every document of which a longer one contains at least half.

  Texts are compared as words, ignoring case, whitespace and punctuation: a document is dropped if
  at least DUPLICATE_SHARE of its distinct runs of SHINGLE_WORDS words (its shingles) occur in one
  kept document that has at least as many. So one of several exact copies is kept, and the longer
  of a written and a spoken version. A document without words is dropped but not reported.

  Returns:
    The kept documents, in the given order, and the duplicates, longest first.
  """
  word_ids: dict[str, int] = {}
  shingles = {}
  for index, document in enumerate(documents):
    if words := re.findall(r"\w+", document.text.lower()):
      shingles[index] = _shingles(words, word_ids)
  if not shingles:
    return [], []
  _, inverse, counts = np.unique(np.concatenate(list(shingles.values())),
                                 return_inverse=True, return_counts=True)
  ends = np.cumsum([len(found) for found in shingles.values()])
  shared = {index: [s for s in ids if counts[s] > 1] for index, ids in zip(
      shingles, np.split(inverse, ends[:-1]), strict=True)}

  holders = collections.defaultdict(list)  # shared shingle -> documents that are kept
  kept, duplicates = [], []
  for index in sorted(shingles, key=lambda i: -len(shingles[i])):
    overlap = collections.Counter(h for s in shared[index] for h in holders[s])
    of, count = overlap.most_common(1)[0] if overlap else (index, 0)
    share = count / len(shingles[index])
    if share >= DUPLICATE_SHARE:
      duplicates.append(Duplicate(documents[index].id, documents[of].id, round(share, 4)))
      continue
    kept.append(index)
    for shingle in shared[index]:
      holders[shingle].append(index)
  return [documents[index] for index in sorted(kept)], duplicates


def hold_out(documents: Sequence[Document]) -> tuple[list[Document], list[Document]]:
  """Splits documents into (train, held-out), keeping works whole.

  Works are held out in the order of a hash of their names, until at least HELDOUT_FRACTION of the
  documents is held out; each side gets at least one work. A work's hash does not depend on other
  documents, so a corpus that grows by a few documents keeps nearly all of its split.

  Raises:
    FieldError: there are fewer than two works.
  """
  sizes = collections.Counter(document.work for document in documents)
  require(len(sizes) >= 2, "data.corpus", f"{len(sizes)} document(s)",
          "needs at least two different documents with text, one to train on and one to "
          "hold out")
  by_hash = sorted(sizes, key=lambda work: hashlib.sha256(work.encode()).digest())
  held: set[str] = set()
  count = 0
  for work in by_hash[:-1]:
    if count >= HELDOUT_FRACTION * len(documents):
      break
    held.add(work)
    count += sizes[work]
  return ([document for document in documents if document.work not in held],
          [document for document in documents if document.work in held])
