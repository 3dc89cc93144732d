"""A corpus of a few small files, known under the name `tiny`."""

import random

import pytest

from moe_jax.data import corpus, offline

TEXT = ("the union of states stands strong while commerce and labor prosper under wise laws "
         "peace reigns abroad treaties were signed congress shall deliberate upon revenue "
         "naïve façade — ½")


def write_documents(folder, count=20, words=120):
  folder.mkdir(parents=True, exist_ok=True)
  draw = random.Random(0)
  for index in range(count):
    text = " ".join(draw.choices(TEXT.split(), k=words + index)) + "\n"
    (folder / f"document-{index:02d}.txt").write_bytes(text.encode())


def folder_corpus(folder, version="1.0.0"):
  return corpus.Corpus("tiny", version, lambda: offline.read_folder(folder))


@pytest.fixture
def tiny(tmp_path, monkeypatch):
  """The folder that the corpus `tiny` reads."""
  folder = tmp_path / "texts"
  write_documents(folder)
  monkeypatch.setitem(corpus.CORPORA, "tiny", folder_corpus(folder))
  return folder
