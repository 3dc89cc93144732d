"""Tokenizers: bytes, and a byte-level BPE trained on the corpus.

Both emit any text without an unknown token, give it back unchanged, and have one more id,
`document_start_id`, which no text produces: it begins every document.
"""

import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np

from moe_jax.errors import FieldError

SEPARATOR = "<|document|>"


class Tokenizer(Protocol):
  """Text to token ids and back.

  Attributes:
    vocab_size: ids are below it.
    document_start_id: the id that begins a document.
  """

  vocab_size: int
  document_start_id: int

  def encode(self, text: str) -> np.ndarray:
    """Token ids of the text alone, int32 [T]; none of them is document_start_id."""

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    """`encode` of each text; quicker where the tokenizer has threads."""

  def decode(self, ids: Iterable[int]) -> str:
    """The text. Separators are left out; bytes that are not UTF-8 become U+FFFD."""


class ByteTokenizer:
  """UTF-8 bytes are the ids 0 to 255; 256 begins a document."""

  vocab_size = 257
  document_start_id = 256

  def encode(self, text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    return [self.encode(text) for text in texts]

  def decode(self, ids: Iterable[int]) -> str:
    return bytes(i for i in map(int, ids) if i < 256).decode(errors="replace")


class BpeTokenizer:
  """A byte-level BPE, read from the `tokenizer.json` that `train_bpe` wrote."""

  def __init__(self, file: pathlib.Path):
    import tokenizers  # here, so that what reads no text starts without it
    try:
      self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exceptions
      raise FieldError("data.tokenizer", str(file), f"cannot be read: {error}") from None
    # A text that spells out the separator is text, not the end of a document.
    self._tokenizer.encode_special_tokens = True
    self.vocab_size = self._tokenizer.get_vocab_size()
    self.document_start_id = self._tokenizer.token_to_id(SEPARATOR)
    if self.document_start_id is None:
      raise FieldError("data.tokenizer", str(file), f"must have the token {SEPARATOR}")

  def encode(self, text: str) -> np.ndarray:
    return self.encode_batch([text])[0]

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    found = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    return [np.array(encoding.ids, np.int32) for encoding in found]

  def decode(self, ids: Iterable[int]) -> str:
    return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)


def train_bpe(texts: Iterator[str], vocab_size: int, file: pathlib.Path) -> None:
  """Trains a byte-level BPE and writes it as `tokenizer.json`.

  The vocabulary holds the separator, all 256 bytes, and merges up to `vocab_size`; fewer
  where the corpus has no more pairs to merge. The same texts give the same file.
  """
  from tokenizers import Tokenizer as HfTokenizer
  from tokenizers import decoders, models, pre_tokenizers, trainers
  tokenizer = HfTokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
      vocab_size=vocab_size, special_tokens=[SEPARATOR], show_progress=False,
      initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
  tokenizer.save(str(file))
