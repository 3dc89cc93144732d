"""Loads packed rows of tokens: shuffled and endless for training, each once for evaluation.

A split is one stream: its documents in order, each preceded by the separator. Row r of length S
has inputs stream[r*S : (r+1)*S]; its targets are shifted by one token. A separator as a target
means that the document has ended. Segments give the document of each input, so that attention
can stop at document boundaries. In a mixture each corpus has its own rows, and mixing.py
determines how they are interleaved.
"""

from collections.abc import Iterator

import grain
import numpy as np

from moe_jax.data import mixing
from moe_jax.data.prepare import PreparedData, Split
from moe_jax.errors import require

Batch = dict[str, np.ndarray]

_PREFETCH_BATCHES = 4


def _gather(split: Split, positions_BS: np.ndarray) -> Batch:
  """Returns the batch whose inputs are at the given positions of the stream."""
  segments_BS = np.searchsorted(split.starts_D1, positions_BS, side="right") - 1
  return {"inputs_BS": split.tokens_N[positions_BS].astype(np.int32),
          "targets_BS": split.tokens_N[positions_BS + 1].astype(np.int32),
          "segments_BS": segments_BS.astype(np.int32)}


def n_train_rows(prepared: PreparedData, seq_len: int) -> int:
  """Returns the number of train rows; an incomplete row at a corpus's end is never used."""
  return sum(mixing.n_rows(prepared, seq_len))


def train_dataset(prepared: PreparedData, seq_len: int, batch_size: int, seed_data: int,
                  mine: np.ndarray | None = None) -> grain.MapDataset:
  """Returns endless global batches with random access: element n is the batch of step n.

  Each epoch of a corpus visits all its rows once, in a new order; a batch may span two epochs, so
  that no row is skipped.

  Args:
    prepared: the corpus.
    seq_len: tokens in a row.
    batch_size: rows in a global batch.
    seed_data: seed of the order.
    mine: indices of the rows of a global batch, 0 to batch_size - 1, that this process reads; all
      if None.

  Returns:
    A dataset of dicts of int32 [rows read, seq_len]: `inputs_BS`, `targets_BS`, and
    `segments_BS`, the number of each input's document in the split.

  Raises:
    FieldError: there are fewer rows than in a batch, or a corpus of a mixture has no row.
  """
  split = prepared.splits["train"]
  rows = n_train_rows(prepared, seq_len)
  require(rows >= batch_size, "train.batch_size", batch_size,
          f"must be at most {rows}: the {split.n_tokens} tokens of the train split make "
          f"no more rows of data.seq_len={seq_len}")
  offsets_S = np.arange(seq_len)

  def load(starts_B: np.ndarray) -> Batch:
    starts_B = np.asarray(starts_B)
    starts_B = starts_B if mine is None else starts_B[mine]
    return _gather(split, starts_B[:, None] + offsets_S)

  # Row offsets are batched before tokens are read, so that a batch is a single NumPy gather.
  return mixing.row_starts(prepared, seq_len, seed_data).batch(batch_size).map(load)


def train_iterator(prepared: PreparedData, seq_len: int, batch_size: int, seed_data: int,
                   mine: np.ndarray | None = None) -> grain.DatasetIterator:
  """Iterates over `train_dataset` from its beginning, prefetching in a thread.

  `get_state()` is `{"next_index": step}`, the step of the batch that `next` will return: JSON that
  does not depend on the number of processes or devices. `set_state` restores it.
  Every process of a pod knows the order of all rows and reads only its own.
  """
  dataset = train_dataset(prepared, seq_len, batch_size, seed_data, mine)
  options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=_PREFETCH_BATCHES)
  return iter(dataset.to_iter_dataset(options))


class EvalRows:
  """Rows of a split in which every target occurs once; a row has no context from earlier rows.

  All tokens of the split are targets except the first, which has no predecessor. A target counts
  toward the document of its input, so a document's loss includes the prediction of its end, except
  for the last document, which no separator follows.
  """

  def __init__(self, split: Split, seq_len: int):
    self._split, self._seq_len = split, seq_len
    self.n_targets = split.n_tokens - 1

  def __len__(self) -> int:
    return -(-self.n_targets // self._seq_len)

  def batches(self, batch_size: int, seed: int | None = None) -> Iterator[Batch]:
    """Yields all rows in dicts of arrays [batch_size, seq_len]: `inputs_BS`, `targets_BS` and
    `segments_BS` (int32), and `mask_BS` (bool), which is False on padding.

    The last row is padded to seq_len, and the last batch is filled with rows of padding. Padding
    has segment -1 and repeats the last input and target.

    Args:
      batch_size: rows in a batch; it does not affect their order.
      seed: shuffles the full rows; a padded row stays last. None keeps the order of the text.
    """
    rows_N = np.arange(len(self))
    if seed is not None:
      np.random.default_rng(seed).shuffle(rows_N[:self.n_targets // self._seq_len])
    for start in range(0, len(self), batch_size):
      rows_B = np.arange(start, start + batch_size)  # rows beyond the last are padding
      known_B = rows_N[start:start + batch_size]
      rows_B[:len(known_B)] = known_B
      yield self._load(rows_B)

  def _load(self, rows_B: np.ndarray) -> Batch:
    positions_BS = rows_B[:, None] * self._seq_len + np.arange(self._seq_len)
    mask_BS = positions_BS < self.n_targets
    batch = _gather(self._split, np.minimum(positions_BS, self.n_targets - 1))
    batch["segments_BS"] = np.where(mask_BS, batch["segments_BS"], np.int32(-1))
    return batch | {"mask_BS": mask_BS}
