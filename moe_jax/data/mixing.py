"""Orders the training rows of a corpus, or of a weighted mixture of corpora.

The n-th training row is a function of the seed and n alone. So a run can resume at any step, and
any number of processes, each reading its part of a batch, produce the same batches.

* A corpus's rows come in epochs: each row once, in an order that differs between epochs. No row
  repeats before all others of its corpus have been read.
* Each period of MIXTURE_PERIOD rows holds exactly the share of each corpus (rounded to whole rows),
  evenly spread: of a corpus's k rows, the m-th is placed at random within the m-th of k equal
  intervals of the period.
* A corpus's rows and their order do not depend on the other corpora.
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
  """Counts the rows of each corpus's train split; tokens past its last full row are never read."""
  split = prepared.splits["train"]
  return [max(0, len(split.domain_tokens(domain)) - 1) // seq_len
          for domain in range(len(split.domain_starts))]


def row_starts(prepared: PreparedData, seq_len: int, seed_data: int) -> grain.MapDataset:
  """Returns an endless dataset of the index in tokens_N of each row's first token.

  Raises:
    FieldError: a corpus of a mixture is too short for one row.
  """
  split, rows = prepared.splits["train"], n_rows(prepared, seq_len)
  if len(rows) == 1:
    return _epochs(0, rows[0], seq_len, seed_data)
  orders = []
  for number, (domain, count) in enumerate(zip(prepared.domains, rows, strict=True)):
    tokens = split.domain_tokens(number)
    require(count > 0, "data.corpus", domain.corpus, f"its train split has {len(tokens)} "
            f"tokens, too few for one row of data.seq_len={seq_len}")
    orders.append(_epochs(tokens.start, count, seq_len, _seed(seed_data, domain.corpus)))
  counts = period_counts([domain.weight for domain in prepared.domains])
  return grain.MapDataset.select_from_datasets(orders, Interleaving(counts, seed_data))


def _epochs(start: int, rows: int, seq_len: int, seed: int) -> grain.MapDataset:
  stop = start + rows * seq_len
  return grain.MapDataset.range(start, stop, seq_len).seed(seed).shuffle().repeat()


def _seed(seed_data: int, corpus: str) -> int:
  """Derives a seed for each corpus, so that corpora of equal length get different orders."""
  return int.from_bytes(hashlib.sha256(f"{seed_data} {corpus}".encode()).digest()[:4], "little")


def period_counts(weights: Sequence[float]) -> tuple[int, ...]:
  """Apportions MIXTURE_PERIOD rows to the corpora by the largest-remainder method.

  Args:
    weights: sum to 1; none is below 1 / MIXTURE_PERIOD (DataConfig checks this).
  """
  exact = np.asarray(weights) * MIXTURE_PERIOD
  counts = np.floor(exact + 1e-6).astype(int)
  short = MIXTURE_PERIOD - counts.sum()
  counts[np.argsort(counts - exact, kind="stable")[:short]] += 1
  return tuple(counts.tolist())


class Interleaving(grain.transforms.DatasetSelectionMap):
  """Maps the index of a row of the mixture to (corpus, index among that corpus's rows)."""

  def __init__(self, counts: tuple[int, ...], seed: int):
    """`counts` comes from period_counts; `seed` determines the order within a period."""
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
  """Returns, for each place in a period, the corpus and the rank among its rows of the period."""
  random = np.random.default_rng([seed, period])
  ranks = [np.arange(count) for count in counts]
  places = [(rank + random.random(len(rank))) / max(len(rank), 1) for rank in ranks]
  order = np.argsort(np.concatenate(places), kind="stable")
  return np.repeat(np.arange(len(counts)), counts)[order], np.concatenate(ranks)[order]
