"""Prepares a corpus and prints its card.

    python -m moe_jax.data --corpus=sotu --tokenizer=bpe-4096 --data_dir=runs/_data
"""

import json

from absl import flags

from moe_jax import cli
from moe_jax.config import DataConfig
from moe_jax.data.prepare import prepare
from moe_jax.errors import FieldError

_FLAGS = {"data.corpus": "corpus", "data.tokenizer": "tokenizer", "out": "data_dir"}

_CORPUS = flags.DEFINE_string("corpus", DataConfig.corpus, "Name of the corpus.")
_TOKENIZER = flags.DEFINE_string(
    "tokenizer", DataConfig.tokenizer, "'bytes', or 'bpe-N': a byte-level BPE of N tokens "
    "trained on the corpus.")
_DATA_DIR = flags.DEFINE_string(
    "data_dir", "runs/_data", "Local directory for prepared data; runs share it.")


def main(overrides: list[str]) -> None:
  if overrides:
    field, _, value = overrides[0].removeprefix("--").partition("=")
    raise FieldError(field, value, "is not a flag of this command; it takes --corpus, "
                     "--tokenizer and --data_dir")
  try:
    data = DataConfig(corpus=_CORPUS.value, tokenizer=_TOKENIZER.value)
    prepared = prepare(data, _DATA_DIR.value)
  except FieldError as error:  # this command's flags are not those of a run
    raise FieldError(_FLAGS.get(error.field, error.field), error.value,
                     error.accepted) from None
  print(json.dumps(prepared.card, indent=2))


if __name__ == "__main__":
  cli.run(main)
