"""The tasks that ship with the project, made of the held-out documents of a run's text. No JAX.

`<out>/_data/_tasks/<fingerprint>/` gets a JSONL and a YAML file for each: the YAML files of
moe_jax/evaluate/tasks with the place of the JSONL filled in, so that lm_eval's own command can run
them on an exported model too (--include_path). The same text gives the same files.

* heldout_cloze: the last word of a passage. It has at least five letters and stands in the
  passage before, so that a model that uses its context can know it.
* heldout_choice: how a passage goes on: its own next words, or those behind three other passages.
* heldout_bits: the beginnings of documents, whole, in bits per byte.
"""

import hashlib
import json
import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from moe_jax.data import cache, mirror
from moe_jax.data.prepare import PreparedData
from moe_jax.errors import FieldError

TASKS = pathlib.Path(__file__).resolve().parent.parent / "tasks"
NAMES = tuple(sorted(file.stem for file in TASKS.glob("*.yaml")))

_VERSION = 1  # raise it when the same text gives other questions
_QUESTIONS = 200  # of a task, at most
_DOCUMENTS = 1000  # that are looked at, evenly spaced
_TOKENS = 50_000  # of each
_CONTEXT_WORDS, _NEXT_WORDS = 32, 8
_LETTERS = 5
_BITS_CHARACTERS = 1000
_PLACEHOLDER = "DIRECTORY"


class Passage(NamedTuple):
  """Words of a document as they stand there: `context`, and ` next words` behind them."""

  context: str
  next: str


def build(prepared: PreparedData, data_dir: str | os.PathLike,
          names: Sequence[str] = NAMES) -> pathlib.Path:
  """The directory with the tasks' files, made if they are not there.

  Args:
    prepared: the text of a run.
    data_dir: <out>/_data, local or not.
    names: tasks that must be there; one to which the text gives no question has no file.

  Raises:
    FieldError: the held-out documents give no question to one of them.
  """
  directory = mirror.home(data_dir).absolute() / "_tasks" / prepared.fingerprint
  yaml = {name: (TASKS / f"{name}.yaml").read_text() for name in NAMES}
  key = {"version": _VERSION, "fingerprint": prepared.fingerprint, "directory": str(directory),
         "yaml": hashlib.sha256(json.dumps(yaml).encode()).hexdigest()}

  def write(folder: pathlib.Path) -> None:
    for name, questions in make(list(documents(prepared))).items():
      if questions:
        (folder / f"{name}.jsonl").write_text("".join(
            json.dumps(question, ensure_ascii=False) + "\n" for question in questions),
            encoding="utf-8")
        (folder / f"{name}.yaml").write_text(yaml[name].replace(_PLACEHOLDER, str(directory)),
                                             encoding="utf-8")

  cache.obtain(directory, key, write)
  for name in names:
    if name in NAMES and not (directory / f"{name}.yaml").exists():
      raise FieldError("tasks", name, f"the {prepared.splits['heldout'].n_documents} held-out "
                       "document(s) are too few or too short for a question")
  return directory


def make(texts: Sequence[str]) -> dict[str, list[Mapping]]:
  """The questions of each task, from the texts of documents."""
  found = _first_by_hash({passage for text in texts for passage in passages(text)})
  clozes = [question for passage in found if (question := cloze(passage)) is not None]
  beginnings = {text[:_BITS_CHARACTERS] for text in texts if text.strip()}
  return {
      "heldout_cloze": clozes[:_QUESTIONS],
      "heldout_choice": choices(found[:_QUESTIONS]),
      "heldout_bits": [{"text": text} for text in _first_by_hash(beginnings)[:_QUESTIONS]]}


def documents(prepared: PreparedData) -> Iterator[str]:
  """Texts of held-out documents, evenly spaced, cut where they are long."""
  split = prepared.splits["heldout"]
  count = min(_DOCUMENTS, split.n_documents)
  for number in np.linspace(0, split.n_documents - 1, count).astype(int):
    start, end = split.starts_D1[number:number + 2]
    yield prepared.tokenizer.decode(split.tokens_N[start:min(end, start + _TOKENS)])


def passages(text: str) -> Iterator[Passage]:
  """Passages that follow one another; those whose next words do not stand in its line are out."""
  words = list(re.finditer(r"\S+", text))
  size = _CONTEXT_WORDS + _NEXT_WORDS
  for first in range(0, len(words) - size + 1, size):
    context, following = (words[first:first + _CONTEXT_WORDS],
                          words[first + _CONTEXT_WORDS:first + size])
    end = context[-1].end()
    passage = Passage(text[context[0].start():end], text[end:following[-1].end()])
    if re.match(r" \S", passage.next) and "\n" not in passage.next and "\ufffd" not in (
        passage.context + passage.next):
      yield passage


def cloze(passage: Passage) -> dict[str, str] | None:
  """The passage up to the last of its next words that stands in it before, and that word."""
  whole = passage.context + passage.next
  for found in reversed(list(re.finditer(rf" ([^\W\d_]{{{_LETTERS},}})", whole))):
    if found.start() < len(passage.context):
      return None
    if re.search(rf"\b{found[1]}\b", whole[:found.start()]):
      return {"context": whole[:found.start()], "target": found[0]}
  return None


def choices(found: Sequence[Passage]) -> list[dict]:
  """Each passage with its next words among those of three others; none where there are not four.

  The three others come after it in their order, so the four are as alike in length as words are.
  """
  if len({passage.next for passage in found}) < 4:
    return []
  questions = []
  for number, passage in enumerate(found):
    behind = [*found[number + 1:], *found[:number]]
    others = list(dict.fromkeys(other.next for other in behind if other.next != passage.next))[:3]
    label = _hash(passage)[0] % 4
    questions.append({"context": passage.context, "label": label,
                      "choices": [*others[:label], passage.next, *others[label:]]})
  return questions


def _first_by_hash(found: set) -> list:
  """In an order that has nothing to do with where they stand, the same for the same text."""
  return sorted(found, key=_hash)


def _hash(value: str | Passage) -> bytes:
  return hashlib.sha256(json.dumps(value).encode()).digest()
