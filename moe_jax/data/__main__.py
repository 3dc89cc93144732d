"""Prepares a corpus and prints its card, or adds a corpus built from your own text.

    python -m moe_jax.data --corpus=sotu --tokenizer=bpe-4096 --data_dir=runs/_data
    python -m moe_jax.data --corpus=sotu:0.7,python:0.3 --tokenizer=bpe-4096

    python -m moe_jax.data --add=stories --from='stories/*.jsonl' --text_field=story
    python -m moe_jax.data --add=web --from=web/ --domain=web     # text, JSON lines, Parquet
    python -m moe_jax.data --add=wiki --tfds=wiki --tfds_dir=gs://bucket/tfds
"""

import json
import pathlib

from absl import flags

from moe_jax import cli
from moe_jax.config import DataConfig
from moe_jax.data import adding, documents, tokenizer
from moe_jax.data.prepare import prepare
from moe_jax.data.sources import Source
from moe_jax.errors import FieldError, require
from moe_jax.files import is_local

_FLAGS = {"data.corpus": "corpus", "corpus": "corpus", "data.tokenizer": "tokenizer",
          "out": "data_dir"}

_CORPUS = flags.DEFINE_string(
    "corpus", DataConfig.corpus, "Name of the corpus, or several: NAME:WEIGHT,NAME:WEIGHT.")
_TOKENIZER = flags.DEFINE_string(
    "tokenizer", DataConfig.tokenizer, "'bytes'; 'bpe-N': a byte-level BPE of N tokens trained "
    "on the corpus; 'gpt2'; or the path of a tokenizer.json, which is copied and named.")
_DATA_DIR = flags.DEFINE_string(
    "data_dir", "runs/_data", "Local directory for prepared data; runs share it.")
_PROCESSES = flags.DEFINE_integer(
    "processes", None, "Number of processes that read or tokenize; one per core by default.",
    lower_bound=1)

_ADD = flags.DEFINE_string(
    "add", None, "Adds a corpus of this name, built from --from or --tfds. With --tokenizer it is "
    "also tokenized.")
_FROM = flags.DEFINE_multi_string(
    "from", [], "File, folder or pattern of text, .jsonl or .parquet files; may be repeated. "
    "Local or gs://.")
_TEXT_FIELD = flags.DEFINE_string(
    "text_field", Source.text_field, "JSON field, Parquet column or TFDS feature with the text.")
_SEPARATOR = flags.DEFINE_string(
    "separator", None, "String that separates the documents of a text file, e.g. '<|endoftext|>'. "
    "By default a text file is one document.")
_DOMAIN = flags.DEFINE_string(
    "domain", None, "Label under which the corpus's losses are reported; its name by default.")
_HELDOUT_FRACTION = flags.DEFINE_float(
    "heldout_fraction", documents.HELDOUT_FRACTION, "Share of the documents that is held out.")
_TFDS = flags.DEFINE_string(
    "tfds", None, "An existing TFDS dataset of array_record files: NAME, NAME/CONFIG or "
    "NAME:VERSION.")
_TFDS_DIR = flags.DEFINE_string("tfds_dir", None, "The data_dir of --tfds, local or gs://.")
_TFDS_SPLIT = flags.DEFINE_string("tfds_split", Source.tfds_split, "The split of --tfds to read.")

_OF_ADD = (_FROM, _TFDS, _SEPARATOR, _DOMAIN, _TEXT_FIELD, _HELDOUT_FRACTION, _TFDS_DIR,
           _TFDS_SPLIT)


def main(overrides: list[str]) -> None:
  cli.no_overrides(overrides)
  require(is_local(_DATA_DIR.value), "data_dir", _DATA_DIR.value, "must be a local path; runs "
          "that write to a bucket prepare their own data")
  others, why = ((_OF_ADD, "can only be used with --add=NAME")
                 if _ADD.value is None else ((_CORPUS,), "cannot be combined with --add, "
                                                "which names the corpus"))
  for flag in others:
    require(not flag.present, flag.name, flag.value, why)
  try:
    card = _prepare() if _ADD.value is None else _add()
  except FieldError as error:  # errors name fields of a run; this command's flags differ
    raise FieldError(_FLAGS.get(error.field, error.field), error.value,
                     error.accepted) from None
  print(json.dumps(card, indent=2))


def _prepare(corpus: str | None = None) -> dict:
  # Validates the corpus before tokenizer.add stores a file.
  data = DataConfig(corpus=_CORPUS.value if corpus is None else corpus)
  file = _TOKENIZER.value
  name = tokenizer.add(pathlib.Path(file).expanduser(), pathlib.Path(_DATA_DIR.value)) if (
      file.endswith(".json")) else file
  return prepare(DataConfig(corpus=data.corpus, tokenizer=name), _DATA_DIR.value,
                 _PROCESSES.value).card


def _add() -> dict:
  source = Source(tuple(_FROM.value), _TEXT_FIELD.value, _SEPARATOR.value, _TFDS.value,
                  _TFDS_DIR.value, _TFDS_SPLIT.value)
  card = adding.add(
      _ADD.value, source, _DATA_DIR.value, domain=_DOMAIN.value,
      heldout_fraction=_HELDOUT_FRACTION.value, processes=_PROCESSES.value)
  return _prepare(_ADD.value) if flags.FLAGS["tokenizer"].present else card


if __name__ == "__main__":
  cli.run(main)
