"""The shipped tasks: the same questions from the same text, and answers that are there."""

import dataclasses
import json
import re

import pytest

from moe_jax.data import corpus
from moe_jax.data.prepare import prepare
from moe_jax.errors import FieldError
from moe_jax.evaluate.harness import suite
from tests.data.conftest import folder_corpus, write_documents
from tests.small import small_config


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  """A corpus that holds out three documents of some 400 words."""
  folder = tmp_path_factory.mktemp("texts")
  write_documents(folder, count=60, words=400)
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(corpus.CORPORA, "longer", dataclasses.replace(
        folder_corpus(folder), name="longer"))
    yield prepare(small_config(data={"corpus": "longer"}).data, folder / "_data")


def read(directory):
  return {name: [json.loads(line) for line in (directory / f"{name}.jsonl").open()]
          for name in suite.NAMES}


def sentence(number, words=150):
  return " ".join(f"{'even' if n % 3 else 'lettered'}{'ab' * (n % 2)} {number + n}"
                  for n in range(words)) + " certainly it was certainly"


TEXTS = [f"{sentence(number)}\nNew line {sentence(number + 1000)}"
         for number in range(0, 4000, 500)]


def test_the_suite_is_made_once_and_is_the_same_again(prepared, tmp_path):
  directory = suite.build(prepared, tmp_path)
  assert directory == tmp_path / "_tasks" / prepared.fingerprint
  first, when = read(directory), (directory / "heldout_bits.jsonl").stat().st_mtime_ns
  suite.build(prepared, tmp_path)
  assert (directory / "heldout_bits.jsonl").stat().st_mtime_ns == when
  assert all(first.values())
  assert read(suite.build(prepared, tmp_path / "other")) == first
  for name in suite.NAMES:  # the files that lm_eval reads know where the questions are
    text = (directory / f"{name}.yaml").read_text()
    assert str(directory / f"{name}.jsonl") in text and "DIRECTORY" not in text
    assert f"\ntask: {name}\n" in text


def test_all_is_of_the_heldout_documents(prepared, tmp_path):
  texts = list(suite.documents(prepared))
  assert len(texts) == prepared.splits["heldout"].n_documents
  for name, questions in read(suite.build(prepared, tmp_path)).items():
    for question in questions:
      whole = {"heldout_cloze": lambda q: q["context"] + q["target"],
               "heldout_choice": lambda q: q["context"] + q["choices"][q["label"]],
               "heldout_bits": lambda q: q["text"]}[name](question)
      assert any(whole in text for text in texts)


def test_a_cloze_asks_for_a_word_that_stands_there_before():
  questions = suite.make(TEXTS)["heldout_cloze"]
  assert questions
  for question in questions:
    word = question["target"].removeprefix(" ")
    assert question["target"] == f" {word}" and len(word) >= 5 and word.isalpha()
    assert re.search(rf"\b{word}\b", question["context"])
  passage = suite.Passage("one lonely word", " and others follow here")
  assert suite.cloze(passage) is None
  inside = suite.Passage("these tests check shards", " with tests1 and shards_x")
  assert suite.cloze(inside) is None  # "tests" and "shards" are only parts of words there
  assert suite.cloze(suite.Passage("a lonely word", " was lonely there")) == {
      "context": "a lonely word was", "target": " lonely"}


def test_choices_are_four_and_the_label_is_not_always_the_same():
  questions = suite.make(TEXTS)["heldout_choice"]
  assert {question["label"] for question in questions} == {0, 1, 2, 3}
  for question in questions:
    assert len(set(question["choices"])) == 4
    assert all(re.match(r" \S", choice) and "\n" not in choice for choice in question["choices"])
  assert suite.choices([suite.Passage("a", " b")] * 9) == []


def test_the_order_of_the_documents_does_not_matter():
  assert suite.make(TEXTS) == suite.make(TEXTS[::-1])


def test_a_task_without_a_question_is_one_line_where_it_is_asked(prepared, tmp_path, monkeypatch):
  monkeypatch.setattr(suite, "documents", lambda prepared: iter(["too short"]))
  with pytest.raises(FieldError, match="heldout_cloze'.*too few or too short") as error:
    suite.build(prepared, tmp_path, ("mine", "heldout_bits", "heldout_cloze"))
  assert "\n" not in str(error.value)
  directory = suite.build(prepared, tmp_path, ("mine", "heldout_bits"))
  assert {file.name for file in directory.glob("heldout*")} == {
      "heldout_bits.jsonl", "heldout_bits.yaml"}
