"""TFDS datasets of the corpora: array_record files, no TensorFlow.

Importing this module costs half a second and is needed only to build or read a dataset;
training reads the tokens that `prepare` made of it.
"""

import contextlib
import dataclasses
import io
import pathlib
import shutil
from collections.abc import Iterator

import tensorflow_datasets as tfds
from absl import logging

from moe_jax.data import corpus as corpus_lib
from moe_jax.errors import FieldError


class TextBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """Documents of `CORPUS`, deduplicated, in splits `train` and `heldout`.

  Each example has `id` and `text` (UTF-8 bytes when read). The metadata lists what
  deduplication left out.
  """

  CORPUS: corpus_lib.Corpus
  # Nothing is downloaded, so there are no checksums; to look for a file of them, TFDS
  # would import importlib_resources, which it does not install.
  url_infos = None

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
        builder=self,
        features=tfds.features.FeaturesDict(
            {"id": tfds.features.Text(), "text": tfds.features.Text()}),
        disable_shuffling=True,  # the order of documents is part of the dataset
        homepage=self.CORPUS.homepage,
        license=self.CORPUS.license,
        metadata=tfds.core.MetadataDict())

  def _split_generators(self, dl_manager):
    kept, duplicates = corpus_lib.deduplicate(self.CORPUS.read())
    try:
      train, heldout = corpus_lib.hold_out(kept)
    except FieldError as error:
      raise FieldError(error.field, self.CORPUS.name,
                       f"has {error.value}: {error.accepted}") from None
    self.info.metadata["duplicates"] = [dataclasses.asdict(d) for d in duplicates]
    return {"train": self._generate_examples(train),
            "heldout": self._generate_examples(heldout)}

  def _generate_examples(self, documents):
    for index, document in enumerate(documents):
      yield index, {"id": document.id, "text": document.text}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Without what TFDS prints (stdout is for results) and logs below a warning."""
  verbosity = logging.get_verbosity()
  logging.set_verbosity(min(verbosity, logging.WARNING))
  try:
    with contextlib.redirect_stdout(io.StringIO()):
      yield
  finally:
    logging.set_verbosity(verbosity)


def get_builder(corpus: corpus_lib.Corpus, directory: pathlib.Path) -> TextBuilder:
  """The corpus's builder in a TFDS data_dir.

  TFDS takes a dataset's name and version from its class, so every corpus gets one.
  """
  cls = type(corpus.name.title().replace("-", ""), (TextBuilder,), {
      "CORPUS": corpus, "name": corpus.name, "__module__": __name__,
      "VERSION": tfds.core.Version(corpus.version)}, skip_registration=True)
  with _quiet():
    return cls(data_dir=directory, file_format="array_record")


def build(corpus: corpus_lib.Corpus, directory: pathlib.Path) -> None:
  """Writes the TFDS dataset into `directory` (a TFDS data_dir).

  Raises:
    FieldError: the corpus is empty or cannot be read.
  """
  builder = get_builder(corpus, directory)
  tfds.disable_progress_bar()
  with _quiet():
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=1))
  shutil.rmtree(directory / "downloads", ignore_errors=True)


def read(corpus: corpus_lib.Corpus, directory: pathlib.Path,
         split: str) -> Iterator[tuple[str, str]]:
  """(id, text) of each document of a split, in order."""
  source = get_builder(corpus, directory).as_data_source(split)
  for index in range(len(source)):
    example = source[index]
    yield example["id"].decode(), example["text"].decode()


def read_duplicates(corpus: corpus_lib.Corpus, directory: pathlib.Path) -> list[dict]:
  """What deduplication left out of the dataset: `id`, `of` and `share` of each."""
  return get_builder(corpus, directory).info.metadata["duplicates"]
