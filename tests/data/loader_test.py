import json
import pathlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.data import loader
from moe_jax.data.prepare import PreparedData, Split
from moe_jax.errors import FieldError

SEPARATOR = 60_000


def make_split(lengths):
  """A split whose documents have these lengths; every token but separators is unique."""
  documents, value = [], 0
  for length in lengths:
    documents += [SEPARATOR, *range(value, value + length - 1)]
    value += length - 1
  return Split(np.array(documents, np.uint16), np.cumsum([0, *lengths]),
               np.array(lengths, np.int64))


def make_prepared(lengths):
  split = make_split(lengths)
  return PreparedData(pathlib.Path(), {}, {"train": split, "heldout": split})


PREPARED = make_prepared([30, 1, 90, 7, 200, 45, 62])  # 435 tokens
SEQ_LEN, BATCH = 8, 5  # 54 rows: no whole number of batches



def equal(a, b):
  return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


lengths = st.lists(st.integers(1, 40), min_size=1, max_size=12).filter(lambda x: sum(x) > 1)


@given(lengths, st.integers(2, 20), st.data())
@settings(max_examples=100, deadline=None)
def test_a_row_is_a_window_of_the_stream(lengths, seq_len, data):
  prepared = make_prepared(lengths)
  split = prepared.splits["train"]
  rows = loader.n_train_rows(prepared, seq_len)
  assert rows * seq_len + 1 <= split.n_tokens < (rows + 1) * seq_len + 1
  if rows == 0:
    return
  batch_size = data.draw(st.integers(1, rows))
  document_N = np.repeat(np.arange(len(lengths)), lengths)
  batch = loader.train_dataset(prepared, seq_len, batch_size, 3)[data.draw(st.integers(0, 9))]
  assert all(a.shape == (batch_size, seq_len) and a.dtype == np.int32
             for a in batch.values())
  assert list(batch) == ["inputs_BS", "targets_BS", "segments_BS"]
  windows = {tuple(split.tokens_N[r * seq_len:(r + 1) * seq_len].tolist()):
             r * seq_len for r in range(rows)}
  if len(windows) < rows:  # windows of separators alone look the same
    return
  for inputs, targets, segments in zip(*batch.values(), strict=True):
    start = windows[tuple(inputs.tolist())]
    assert targets.tolist() == split.tokens_N[start + 1:start + seq_len + 1].tolist()
    assert segments.tolist() == document_N[start:start + seq_len].tolist()


def test_an_epoch_is_every_row_once_and_the_next_has_another_order():
  rows = loader.n_train_rows(PREPARED, SEQ_LEN)
  dataset = loader.train_dataset(PREPARED, SEQ_LEN, BATCH, 0)
  seen = [row for step in range(3 * rows // BATCH + 1)
          for row in dataset[step]["inputs_BS"].tolist()]
  epochs = [seen[rows * e:rows * (e + 1)] for e in range(3)]
  stream = PREPARED.splits["train"].tokens_N
  every_row = stream[:rows * SEQ_LEN].reshape(rows, SEQ_LEN).tolist()
  assert all(sorted(epoch) == sorted(every_row) for epoch in epochs)
  assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
  assert every_row not in epochs


def test_the_batch_of_a_step_depends_on_seed_and_step_alone():
  dataset = loader.train_dataset(PREPARED, SEQ_LEN, BATCH, 7)
  expected = [dataset[step] for step in range(30)]
  for step in reversed(range(30)):  # in any order, by another object
    again = loader.train_dataset(PREPARED, SEQ_LEN, BATCH, 7)
    assert equal(again[step], expected[step])
  for start in (0, 1, 11, 29):
    iterator = loader.train_iterator(PREPARED, SEQ_LEN, BATCH, 7)
    iterator.set_state({"next_index": start})
    for step in range(start, 30):
      assert equal(next(iterator), expected[step])
  other = loader.train_dataset(PREPARED, SEQ_LEN, BATCH, 8)
  assert not any(equal(other[step], expected[step]) for step in range(30))


def test_the_batch_size_does_not_change_the_order_of_rows():
  small, large = (loader.train_dataset(PREPARED, SEQ_LEN, size, 7) for size in (3, 9))
  assert np.array_equal(np.concatenate([small[i]["inputs_BS"] for i in range(9)]),
                        np.concatenate([large[i]["inputs_BS"] for i in range(3)]))


def test_the_order_is_the_one_written_down():
  """Fails if a library changes the order: then runs could not go on where they stopped."""
  dataset = loader.train_dataset(make_prepared([1001]), 10, 4, 0)
  first = [(dataset[step]["targets_BS"][:, 0] // 10).tolist() for step in (0, 1, 25, 1000)]
  assert first == [[96, 77, 31, 79], [9, 70, 28, 83], [24, 72, 1, 95], [61, 65, 66, 1]]


def test_the_state_is_json_and_goes_on_exactly():
  iterator = loader.train_iterator(PREPARED, SEQ_LEN, BATCH, 7)
  for _ in range(13):
    next(iterator)
  state = json.loads(json.dumps(iterator.get_state()))
  assert state == {"next_index": 13}
  rest = [next(iterator) for _ in range(20)]
  resumed = loader.train_iterator(PREPARED, SEQ_LEN, BATCH, 7)
  next(resumed)
  resumed.set_state(state)
  assert all(equal(next(resumed), batch) for batch in rest)


@pytest.mark.parametrize("lengths, seq_len", [([12], 8), ([3, 2], 8), ([1], 2)])
def test_a_corpus_of_less_than_a_batch_is_refused(lengths, seq_len):
  with pytest.raises(FieldError, match=(r"train\.batch_size=2: must be at most [01]: .*"
                                        rf"data\.seq_len={seq_len}")):
    loader.train_dataset(make_prepared(lengths), seq_len, 2, 0)


@given(lengths, st.integers(2, 20), st.integers(1, 7))
@settings(max_examples=100, deadline=None)
def test_evaluation_covers_every_target_once(lengths, seq_len, batch_size):
  split = make_split(lengths)
  rows = loader.EvalRows(split, seq_len)
  batches = list(rows.batches(batch_size))
  assert all(a.shape == (batch_size, seq_len) for b in batches for a in b.values())
  whole = {name: np.concatenate([b[name] for b in batches]) for name in batches[0]}
  mask_BS = whole["mask_BS"]
  assert mask_BS.dtype == bool
  # The padding is at the very end.
  assert mask_BS.ravel().tolist() == sorted(mask_BS.ravel(), reverse=True)
  document_N = np.repeat(np.arange(len(lengths)), lengths)
  assert whole["inputs_BS"][mask_BS].tolist() == split.tokens_N[:-1].tolist()
  assert whole["targets_BS"][mask_BS].tolist() == split.tokens_N[1:].tolist()
  assert whole["segments_BS"][mask_BS].tolist() == document_N[:-1].tolist()
  assert (whole["segments_BS"][~mask_BS] == -1).all()
  assert len(batches) == -(-len(rows) // batch_size)


@given(lengths, st.integers(2, 20), st.integers(1, 7))
@settings(max_examples=50, deadline=None)
def test_a_seed_changes_nothing_but_the_order_of_the_full_rows(lengths, seq_len, batch_size):
  rows = loader.EvalRows(make_split(lengths), seq_len)

  def whole(*seed):
    batches = list(rows.batches(batch_size, *seed))
    return {name: np.concatenate([b[name] for b in batches]) for name in batches[0]}

  ordered, shuffled = whole(), whole(3)
  full = rows.n_targets // seq_len
  assert all(np.array_equal(ordered[name][full:], shuffled[name][full:]) for name in ordered)
  assert (shuffled["mask_BS"] == ordered["mask_BS"]).all()  # so padding is still last
  as_rows = [sorted(zip(*(found[name][:full].tolist() for name in ordered), strict=True))
             for found in (ordered, shuffled)]
  assert as_rows[0] == as_rows[1]


def test_the_order_of_a_seed_is_the_one_written_down_for_any_batch_size():
  """Fails if a library changes the order: then results could not be compared any more."""
  rows = loader.EvalRows(PREPARED.splits["heldout"], SEQ_LEN)
  assert len(rows) == 55
  first = np.concatenate([b["inputs_BS"] for b in rows.batches(4, 0)])[:8]
  assert np.array_equal(first, next(rows.batches(8, 0))["inputs_BS"])
  every_row = next(rows.batches(len(rows)))["inputs_BS"].tolist()
  assert [every_row.index(row) for row in first.tolist()] == [45, 11, 18, 10, 23, 28, 4, 36]
  assert not np.array_equal(first, next(rows.batches(8, 1))["inputs_BS"])
