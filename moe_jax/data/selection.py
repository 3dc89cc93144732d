"""Decides which documents of a large corpus are kept, and in which split, from their hashes.

Each document is represented by a NOTE, and a 16-byte hash of its words decides; texts are not read
again. A document with the same words as an earlier one is a duplicate. A document is held out if
the hash of its words, scaled to [0, 1), is below the fraction to hold out. This does not depend on
other documents, so a corpus that grows keeps its split, and copies share a split even before they
are found.
"""

import hashlib
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np

EMPTY, DUPLICATE, TRAIN, HELDOUT = range(4)  # possible decisions about a document
SIDES = {"train": TRAIN, "heldout": HELDOUT}

# Record of a document: hashes of its words and of its text, and its UTF-8 bytes (0 if empty).
NOTE = np.dtype([("words", "<u8", 2), ("text", "<u8", 2), ("bytes", "<i8")])

_BUCKET_DOCUMENTS = 4_000_000  # searched for duplicates at a time; bounds memory


def note(text: str, n_bytes: int) -> tuple:
  """Returns the NOTE of a text that is `n_bytes` long in UTF-8."""
  words = text.split()
  return _hash(" ".join(words)), _hash(text), n_bytes if words else 0


def _hash(text: str) -> tuple[int, int]:
  found = hashlib.blake2b(text.encode(), digest_size=16).digest()
  return int.from_bytes(found[:8], "little"), int.from_bytes(found[8:], "little")


def load(file: pathlib.Path) -> np.ndarray:
  return np.load(file, mmap_mode="r")


def decide(files: Sequence[pathlib.Path], heldout_fraction: float) -> np.ndarray:
  """Returns the decision about each document (EMPTY, DUPLICATE, ...), int8 [N], in order.

  If there are two different documents, neither split is empty: whatever the fraction, the one with
  the smallest hash is held out and the one with the largest is trained on.

  Args:
    files: files with arrays of NOTE, in order.
    heldout_fraction: share of the documents to hold out.
  """
  total = sum(len(load(file)) for file in files)
  decisions_N = np.full(total, EMPTY, np.int8)
  n_buckets = max(1, -(-total // _BUCKET_DOCUMENTS))
  extremes = []
  for bucket in range(n_buckets):
    words_M2, number_M = _bucket(files, bucket, n_buckets)
    order = np.lexsort((number_M, words_M2[:, 1], words_M2[:, 0]))
    words_M2, number_M = words_M2[order], number_M[order]
    held_M = words_M2[:, 0].astype(np.float64) < heldout_fraction * 2.0**64
    decisions_N[number_M] = np.where(held_M, HELDOUT, TRAIN)
    copies = 1 + np.flatnonzero((words_M2[1:] == words_M2[:-1]).all(axis=1))
    decisions_N[number_M[copies]] = DUPLICATE
    first = np.delete(np.arange(len(number_M)), copies)
    extremes += [(*words_M2[i].tolist(), int(number_M[i])) for i in {*first[:1], *first[-1:]}]
  if len(extremes) >= 2:
    decisions_N[min(extremes)[2]], decisions_N[max(extremes)[2]] = HELDOUT, TRAIN
  return decisions_N


def _bucket(files: Sequence[pathlib.Path], bucket: int,
            n_buckets: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns (word hashes [M, 2], indices [M]) of the non-empty documents in a hash bucket."""
  words, numbers, start = [np.zeros((0, 2), np.uint64)], [np.zeros(0, np.int64)], 0
  for file in files:
    notes = load(file)
    here = np.flatnonzero((notes["words"][:, 1] % np.uint64(n_buckets) == bucket)
                          & (notes["bytes"] > 0))
    words.append(notes["words"][here])
    numbers.append(here + start)
    start += len(notes)
  return np.concatenate(words), np.concatenate(numbers)


def by_file(files: Sequence[pathlib.Path],
            decisions_N: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Yields (notes, decisions) of each file."""
  start = 0
  for file in files:
    notes = load(file)
    yield notes, decisions_N[start:start + len(notes)]
    start += len(notes)


def fingerprint(files: Sequence[pathlib.Path], decisions_N: np.ndarray) -> str:
  """Hashes the kept texts of each split; does not depend on how they are spread over files."""
  digest = hashlib.sha256()
  for side in SIDES.values():
    for notes, decisions in by_file(files, decisions_N):
      digest.update(notes["text"][decisions == side].tobytes())
    digest.update(b"end of a split")
  return digest.hexdigest()[:16]
