"""Writes a run's tokenizer as files that transformers can load, and reads such files."""

import json
import pathlib

from moe_jax.data import tokenizer as tokenizer_lib
from moe_jax.data.tokenizer import FILE, ByteTokenizer, FileTokenizer, Tokenizer
from moe_jax.errors import FieldError, require


def write(directory: pathlib.Path, tokenizer: Tokenizer, max_length: int) -> None:
  """Writes tokenizer.json and tokenizer_config.json, with the separator as BOS and EOS token."""
  if isinstance(tokenizer, FileTokenizer):
    text, start = tokenizer.to_json(), tokenizer.document_start
  else:
    text, start = _bytes_json(), tokenizer_lib.SEPARATOR
  (directory / FILE).write_text(text, encoding="utf-8")
  (directory / "tokenizer_config.json").write_text(json.dumps({
      "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": start, "eos_token": start,
      "model_max_length": max_length, "clean_up_tokenization_spaces": False}, indent=2) + "\n")


def read(directory: pathlib.Path) -> FileTokenizer:
  """Reads the tokenizer in a Hugging Face directory.

  Raises:
    FieldError: there is no tokenizer.json, or it is unreadable; names `hf`.
  """
  file = directory / FILE
  require(file.is_file(), "hf", str(directory), f"has no {FILE}")
  try:
    return FileTokenizer(file)
  except FieldError as error:
    raise FieldError("hf", error.value, error.accepted) from None


def _bytes_json() -> str:
  """Returns ByteTokenizer as a tokenizer.json: a BPE without merges whose ids are byte values."""
  from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
  # ByteLevel maps byte b to a printable character: chr(b) if printable, else one above chr(255).
  shown = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or 174 <= b <= 255]
  hidden = [b for b in range(256) if b not in shown]
  letter = {b: chr(b) for b in shown} | {b: chr(256 + i) for i, b in enumerate(hidden)}
  model = Tokenizer(models.BPE(vocab={letter[b]: b for b in range(256)}, merges=[]))
  model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  model.decoder = decoders.ByteLevel()
  model.add_special_tokens([AddedToken(tokenizer_lib.SEPARATOR, special=True)])
  assert model.token_to_id(tokenizer_lib.SEPARATOR) == ByteTokenizer.document_start_id
  return model.to_str()
