"""The order in which the rows of a corpus, or of several with weights, are trained on.

Row n of the training follows from the seed and n alone. So a run goes on at any step, and any
number of processes, each reading its part of a batch, makes the same batches.

* A corpus's rows come in epochs: each once, in an order of the epoch's own. No row comes again
  before all others of its corpus have come.
* Of every MIXTURE_PERIOD rows each corpus has its share exactly (rounded to whole rows), spread
  evenly: its m-th row falls, at random, into the m-th of as many equal parts of the period.
* What one corpus's rows are, and their order, does not depend on the others.
"""

import functools
import hashlib
import sys
from collections.abc import Sequence

import grain
import numpy as np

from moe_jax.data.prepare import PreparedData
from moe_jax.errors import require
from moe_jax.sections import MIXTURE_PERIOD


def n_rows(prepared: PreparedData, seq_len: int) -> list[int]:
  """Rows of each corpus's train split; its last tokens, which fill no row, are never read."""
  split = prepared.splits["train"]
  return [max(0, len(split.domain_tokens(domain)) - 1) // seq_len
          for domain in range(len(split.domain_starts))]


def row_starts(prepared: PreparedData, seq_len: int, seed_data: int) -> grain.MapDataset:
  """Where in the tokens of the train split the n-th row begins; endless.

  Raises:
    FieldError: a corpus of a mixture is too short for a row.
  """
  split, rows = prepared.splits["train"], n_rows(prepared, seq_len)
  if len(rows) == 1:
    return _epochs(0, rows[0], seq_len, seed_data)
  orders = []
  for number, (domain, count) in enumerate(zip(prepared.domains, rows, strict=True)):
    tokens = split.domain_tokens(number)
    require(count > 0, "data.corpus", domain.corpus, f"its {len(tokens)} tokens of the train "
            f"split make no row of data.seq_len={seq_len}")
    orders.append(_epochs(tokens.start, count, seq_len, _seed(seed_data, domain.corpus)))
  counts = period_counts([domain.weight for domain in prepared.domains])
  return grain.MapDataset.select_from_datasets(orders, Interleaving(counts, seed_data))


def _epochs(start: int, rows: int, seq_len: int, seed: int) -> grain.MapDataset:
  stop = start + rows * seq_len
  return grain.MapDataset.range(start, stop, seq_len).seed(seed).shuffle().repeat()


def _seed(seed_data: int, corpus: str) -> int:
  """A seed for each corpus, so that two of equal length do not share an order."""
  return int.from_bytes(hashlib.sha256(f"{seed_data} {corpus}".encode()).digest()[:4], "little")


def period_counts(weights: Sequence[float]) -> tuple[int, ...]:
  """Whole rows of each corpus in MIXTURE_PERIOD, by largest remainder.

  Args:
    weights: they sum to 1; none is below 1 / MIXTURE_PERIOD (DataConfig sees to it).
  """
  exact = np.asarray(weights) * MIXTURE_PERIOD
  counts = np.floor(exact + 1e-6).astype(int)
  short = MIXTURE_PERIOD - counts.sum()
  counts[np.argsort(counts - exact, kind="stable")[:short]] += 1
  return tuple(counts.tolist())


class Interleaving(grain.transforms.DatasetSelectionMap):
  """Index of a row of the mixture -> (corpus, index among its rows)."""

  def __init__(self, counts: tuple[int, ...], seed: int):
    """`counts` as of period_counts; `seed` of the places in a period."""
    self._counts, self._seed = counts, seed

  def __len__(self) -> int:
    return sys.maxsize

  def __getitem__(self, index: int) -> tuple[int, int]:
    period, place = divmod(int(index), sum(self._counts))
    corpus_P, rank_P = _period(self._counts, self._seed, period)
    corpus = int(corpus_P[place])
    return corpus, period * self._counts[corpus] + int(rank_P[place])


@functools.lru_cache(maxsize=8)
def _period(counts: tuple[int, ...], seed: int, period: int) -> tuple[np.ndarray, np.ndarray]:
  """(corpus, number among its rows of the period) of each place in a period."""
  random = np.random.default_rng([seed, period])
  ranks = [np.arange(count) for count in counts]
  places = [(rank + random.random(len(rank))) / max(len(rank), 1) for rank in ranks]
  order = np.argsort(np.concatenate(places), kind="stable")
  return np.repeat(np.arange(len(counts)), counts)[order], np.concatenate(ranks)[order]
