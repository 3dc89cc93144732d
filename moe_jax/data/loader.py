"""Packed rows of tokens: shuffled without end to train on, each once to evaluate on.

A split is one stream: its documents in order, each begun by the separator. Row r of length
S reads inputs stream[r*S : (r+1)*S] and predicts targets one token on; a separator as a
target is the prediction that the document has ended. Segments tell the document of each
input, so that attention can stop at its boundary. Of a mixture each corpus has its own rows,
and mixing.py says whose turn it is.
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
  """The batch whose inputs stand at the given positions of the stream."""
  segments_BS = np.searchsorted(split.starts_D1, positions_BS, side="right") - 1
  return {"inputs_BS": split.tokens_N[positions_BS].astype(np.int32),
          "targets_BS": split.tokens_N[positions_BS + 1].astype(np.int32),
          "segments_BS": segments_BS.astype(np.int32)}


def n_train_rows(prepared: PreparedData, seq_len: int) -> int:
  """Rows of the train split; the last tokens that fill no row are never trained on."""
  return sum(mixing.n_rows(prepared, seq_len))


def train_dataset(prepared: PreparedData, seq_len: int, batch_size: int, seed_data: int,
                  mine: np.ndarray | None = None) -> grain.MapDataset:
  """Global batches by random access: element n is the batch of step n, without end.

  Every epoch of a corpus goes through all its rows once in another order; a batch may span
  two epochs, so that no row is skipped.

  Args:
    prepared: the corpus.
    seq_len: tokens in a row.
    batch_size: rows in a global batch.
    seed_data: of the order.
    mine: which rows of a global batch this process reads, of 0 to batch_size - 1; all if None.

  Returns:
    A dataset of dicts of int32 [rows read, seq_len]: `inputs_BS`, `targets_BS`, and
    `segments_BS`, the document of each input by its number in the split.

  Raises:
    FieldError: the corpus has fewer rows than a batch.
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

  # The rows' places are batched before tokens are read, so that a batch is one numpy gather.
  return mixing.row_starts(prepared, seq_len, seed_data).batch(batch_size).map(load)


def train_iterator(prepared: PreparedData, seq_len: int, batch_size: int, seed_data: int,
                   mine: np.ndarray | None = None) -> grain.DatasetIterator:
  """Iterates over `train_dataset` from its beginning, reading ahead in a thread.

  `get_state()` is `{"next_index": step}`, the step of the batch that `next` gives: JSON,
  and the same whatever the number of processes or devices. `set_state` takes it back.
  Every process of a pod knows the order of all rows and reads those that are its own.
  """
  dataset = train_dataset(prepared, seq_len, batch_size, seed_data, mine)
  options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=_PREFETCH_BATCHES)
  return iter(dataset.to_iter_dataset(options))


class EvalRows:
  """Rows of a split that hold every target once; a row sees nothing of the one before it.

  All tokens of the split are targets but the first, which nothing precedes. The target at a
  position counts for the document of its input: so a document's loss includes its end, except
  for the last document's, which is followed by nothing.
  """

  def __init__(self, split: Split, seq_len: int):
    self._split, self._seq_len = split, seq_len
    self.n_targets = split.n_tokens - 1

  def __len__(self) -> int:
    return -(-self.n_targets // self._seq_len)

  def batches(self, batch_size: int, seed: int | None = None) -> Iterator[Batch]:
    """All rows, in dicts of arrays [batch_size, seq_len]: `inputs_BS`, `targets_BS` and
    `segments_BS` (int32), and `mask_BS` (bool), False where the last row is padded.

    Padding has segment -1 and repeats the last input and target. Rows of padding alone fill the
    last batch up.

    Args:
      batch_size: rows in a batch; it does not change their order.
      seed: shuffles the full rows; one that is padded stays behind them. None keeps the
        order of the text.
    """
    rows_N = np.arange(len(self))
    if seed is not None:
      np.random.default_rng(seed).shuffle(rows_N[:self.n_targets // self._seq_len])
    for start in range(0, len(self), batch_size):
      rows_B = np.arange(start, start + batch_size)  # beyond the last row all is padding
      known_B = rows_N[start:start + batch_size]
      rows_B[:len(known_B)] = known_B
      yield self._load(rows_B)

  def _load(self, rows_B: np.ndarray) -> Batch:
    positions_BS = rows_B[:, None] * self._seq_len + np.arange(self._seq_len)
    mask_BS = positions_BS < self.n_targets
    batch = _gather(self._split, np.minimum(positions_BS, self.n_targets - 1))
    batch["segments_BS"] = np.where(mask_BS, batch["segments_BS"], np.int32(-1))
    return batch | {"mask_BS": mask_BS}
