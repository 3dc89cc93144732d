"""Documents of a corpus that fits into memory: near-duplicates removed, some held out."""

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
  """What decides which documents stay and where: prepared data of another one are stale."""
  return {"heldout_fraction": HELDOUT_FRACTION, "shingle_words": SHINGLE_WORDS,
          "duplicate_share": DUPLICATE_SHARE}


@dataclasses.dataclass(frozen=True)
class Document:
  """One text.

  Attributes:
    id: its name, unique in the corpus.
    text: its text, as it is trained on.
    work: what it is a version or a part of. Documents of one work share passages, so they
      fall on the same side of the split.
  """

  id: str
  text: str
  work: str


@dataclasses.dataclass(frozen=True)
class Duplicate:
  """A document left out: `share` of its shingles are in the document `of`."""

  id: str
  of: str
  share: float


def _shingles(words: Sequence[str], word_ids: dict[str, int]) -> np.ndarray:
  """Hashes of all runs of SHINGLE_WORDS words (one run if there are fewer), uint64 [N]."""
  ids_W = np.array([word_ids.setdefault(word, len(word_ids) + 1) for word in words],
                   np.uint64)
  length = min(SHINGLE_WORDS, len(words))
  # A polynomial modulo 2^64: numpy's integers wrap, and an odd multiplier loses no bits.
  powers = np.cumprod(np.full(length, 6364136223846793005, np.uint64), dtype=np.uint64)
  windows = np.lib.stride_tricks.sliding_window_view(ids_W, length)
  return np.unique((windows * powers).sum(axis=1, dtype=np.uint64))


def deduplicate(documents: Sequence[Document]) -> tuple[list[Document], list[Duplicate]]:
  """Leaves out a document of which a longer one holds at least half.

  Texts are compared as words without case, spacing and punctuation: a document goes if
  DUPLICATE_SHARE of its distinct runs of SHINGLE_WORDS words occur in one longer document
  that stays. So of exact copies one stays, and of a written and a spoken version the
  longer. A document without a word is left out silently.

  Returns:
    What stays, in the given order, and what was left out, longest first.
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

  holders = collections.defaultdict(list)  # shared shingle -> documents that stay
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
  """(train, held-out), by document: whole works, in the order of a hash of their names.

  The hash order does not depend on the other documents, so a corpus that grows by a few
  documents keeps nearly all of its split. Works are held out until HELDOUT_FRACTION of the
  documents is; one work at least stays on each side.

  Raises:
    FieldError: there are not two works to split.
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
