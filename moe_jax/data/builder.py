"""Builds the TFDS dataset of a corpus that fits in memory. Imports TFDS."""

import dataclasses
import pathlib
import shutil

import tensorflow_datasets as tfds

from moe_jax.data import corpus as corpus_lib
from moe_jax.data import dataset, documents, tfds_source
from moe_jax.errors import FieldError


class TextBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """Documents of `CORPUS`, deduplicated, in splits `train` and `heldout`.

  Each example has `id` and `text` (UTF-8 bytes when read). The metadata lists the documents
  that deduplication dropped.
  """

  CORPUS: corpus_lib.Corpus
  # Nothing is downloaded, so there are no checksums. By default TFDS would look for a file of
  # them, and for that import importlib_resources, which is not among its dependencies.
  url_infos = None

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
        builder=self,
        features=dataset.features(),
        disable_shuffling=True,  # the order of documents is part of the dataset
        homepage=self.CORPUS.homepage,
        license=self.CORPUS.license,
        metadata=tfds.core.MetadataDict())

  def _split_generators(self, dl_manager):
    kept, duplicates = documents.deduplicate(self.CORPUS.read())
    try:
      train, heldout = documents.hold_out(kept)
    except FieldError as error:
      raise FieldError(error.field, self.CORPUS.name,
                       f"has {error.value}: {error.accepted}") from None
    self.info.metadata["duplicates"] = [dataclasses.asdict(d) for d in duplicates]
    return {"train": self._generate_examples(train),
            "heldout": self._generate_examples(heldout)}

  def _generate_examples(self, found):
    for index, document in enumerate(found):
      yield index, {"id": document.id, "text": document.text}


def build(corpus: corpus_lib.Corpus, directory: pathlib.Path) -> None:
  """Writes the TFDS dataset into `directory` (a TFDS data_dir).

  TFDS takes a dataset's name and version from its class, so every corpus gets its own class.

  Raises:
    FieldError: the corpus is empty or cannot be read.
  """
  name = dataset.tfds_name(corpus.name)
  cls = type(name.title().replace("_", ""), (TextBuilder,), {
      "CORPUS": corpus, "name": name, "__module__": __name__,
      "VERSION": tfds.core.Version(corpus.version)}, skip_registration=True)
  tfds.disable_progress_bar()
  with tfds_source.quiet():
    cls(data_dir=directory, file_format="array_record").download_and_prepare(
        download_config=tfds.download.DownloadConfig(num_shards=1))
  shutil.rmtree(directory / "downloads", ignore_errors=True)


def read_duplicates(directory: pathlib.Path) -> list[dict]:
  """Reads which documents deduplication dropped: the `id`, `of` and `share` of each."""
  with tfds_source.quiet():
    return tfds.builder_from_directory(directory).info.metadata["duplicates"]
