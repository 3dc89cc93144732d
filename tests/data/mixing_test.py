"""Mixtures: shares, epochs and order of the rows that are trained on."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.config import DataConfig
from moe_jax.data import loader, mixing
from moe_jax.data.prepare import Domain
from moe_jax.errors import FieldError
from moe_jax.sections import MIXTURE_PERIOD
from tests.data.loader_test import make_prepared, make_split

SEQ_LEN, BATCH = 8, 5


def make_mixture(weights, lengths_by_corpus):
  """A mixture of corpora a, b, ... of documents of these lengths."""
  prepared = make_prepared([length for lengths in lengths_by_corpus for length in lengths])
  starts = tuple(np.cumsum([0, *map(len, lengths_by_corpus[:-1])]).tolist())
  splits = {name: dataclasses.replace(split, domain_starts=starts)
            for name, split in prepared.splits.items()}
  domains = tuple(Domain(name, name, weight)
                  for name, weight in zip("abcdef", weights, strict=False))
  return dataclasses.replace(prepared, splits=splits, domains=domains)


MIXTURE = make_mixture([0.7, 0.25, 0.05], [[30, 60, 90], [7, 50], [200, 3]])


def starts_of(prepared, seed=0):
  rows = mixing.row_starts(prepared, SEQ_LEN, seed)
  return lambda *span: np.array([rows[n] for n in range(*span)])


@given(st.lists(st.floats(1e-3, 1), min_size=1, max_size=6))
@settings(max_examples=100, deadline=None)
def test_every_corpus_has_its_share_of_a_period(weights):
  shares = np.array(list(DataConfig(corpus=",".join(
      f"{name}:{weight}" for name, weight in zip("abcdef", weights, strict=False))
  ).mixture.values()))
  counts = mixing.period_counts(shares)
  assert sum(counts) == MIXTURE_PERIOD
  assert (np.abs(np.array(counts) - shares * MIXTURE_PERIOD) < 1).all()
  assert min(counts) >= 1
  order = mixing.Interleaving(counts, 3)
  taken = [order[index] for index in range(MIXTURE_PERIOD, 2 * MIXTURE_PERIOD)]
  for corpus, count in enumerate(counts):
    # Each of its rows once, one after the other.
    assert [row for of, row in taken if of == corpus] == list(range(count, 2 * count))
    # Spread: at any place it has had its share, but for two rows of each corpus.
    had = np.cumsum([of == corpus for of, _ in taken])
    expected = (1 + np.arange(MIXTURE_PERIOD)) * count / MIXTURE_PERIOD
    assert np.abs(had - expected).max() <= 2 * len(counts)


def test_no_row_of_a_corpus_comes_again_before_all_others_came():
  starts = starts_of(MIXTURE)(0, 3000)
  split = MIXTURE.splits["train"]
  for number, rows in enumerate(mixing.n_rows(MIXTURE, SEQ_LEN)):
    tokens = split.domain_tokens(number)
    mine = starts[(starts >= tokens.start) & (starts < tokens.stop)]
    every = [tokens.start + row * SEQ_LEN for row in range(rows)]
    for epoch in range(len(mine) // rows):
      assert sorted(mine[epoch * rows:(epoch + 1) * rows]) == every
    assert mine[:rows].tolist() != mine[rows:2 * rows].tolist()


def test_a_corpus_keeps_its_order_whoever_it_is_mixed_with():
  other = make_mixture([0.5, 0.5], [[30, 60, 90], [11] * 30])
  n_tokens = MIXTURE.splits["train"].domain_tokens(0).stop
  a, b = (starts_of(prepared)(0, 500) for prepared in (MIXTURE, other))
  a, b = a[a < n_tokens], b[b < n_tokens]
  assert len(a) > len(b) > 200
  assert a[:len(b)].tolist() == b.tolist()


def test_the_batch_of_a_step_depends_on_seed_and_step_alone():
  dataset = loader.train_dataset(MIXTURE, SEQ_LEN, BATCH, 7)
  steps = [0, 1, 1999, 2000, 2001, 70_000]  # on both sides of a period's end
  expected = {step: dataset[step]["inputs_BS"] for step in steps}
  for step in reversed(steps):
    iterator = loader.train_iterator(MIXTURE, SEQ_LEN, BATCH, 7)
    iterator.set_state({"next_index": step})
    assert np.array_equal(next(iterator)["inputs_BS"], expected[step])
  other = loader.train_dataset(MIXTURE, SEQ_LEN, BATCH, 8)
  assert not any(np.array_equal(other[step]["inputs_BS"], expected[step]) for step in steps)


def test_a_part_of_a_batch_is_that_part_of_the_global_batch():
  whole = loader.train_dataset(MIXTURE, SEQ_LEN, BATCH, 7)[3]
  part = loader.train_dataset(MIXTURE, SEQ_LEN, BATCH, 7, mine=np.array([1, 4]))[3]
  assert all(np.array_equal(part[name], whole[name][[1, 4]]) for name in whole)


def test_the_order_is_the_one_written_down():
  """Fails if a library changes the order: then runs could not go on where they stopped."""
  rows = starts_of(MIXTURE)
  assert rows(0, 8).tolist() == [144, 228, 16, 56, 32, 88, 196, 48]
  assert rows(10_000, 10_004).tolist() == [212, 80, 0, 112]


def test_a_row_crosses_no_border_and_segments_tell_the_domain():
  split = MIXTURE.splits["train"]
  domain_D = split.domain_D
  assert domain_D.tolist() == [0, 0, 0, 1, 1, 2, 2]
  dataset = loader.train_dataset(MIXTURE, SEQ_LEN, BATCH, 0)
  for step in range(100):
    assert (np.ptp(domain_D[dataset[step]["segments_BS"]], axis=1) == 0).all()


def test_a_split_without_domains_is_one():
  split = make_split([3, 4])
  assert split.domain_D.tolist() == [0, 0]
  assert split.domain_tokens(0) == range(7)


def test_a_corpus_too_short_for_a_row_is_named():
  mixture = make_mixture([0.5, 0.5], [[30, 60, 90], [8]])
  with pytest.raises(FieldError, match=r"data\.corpus='b': its train split has 8 tokens, too few "
                     r"for one row of data\.seq_len=8"):
    loader.train_dataset(mixture, SEQ_LEN, BATCH, 0)
