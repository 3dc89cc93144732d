"""Builds the tasks that ship with the project from the held-out documents of a run. No JAX.

`<out>/_data/_tasks/<fingerprint>/` gets a JSONL and a YAML file for each task. The YAML files are
those of moe_jax/evaluate/tasks with the path of the JSONL filled in, so that lm_eval's own command
can also run them on an exported model (--include_path). The same text gives the same files.

* heldout_cloze: predict the last word of a passage. It has at least five letters and also occurs
  earlier in the passage, so a model that uses its context can predict it.
* heldout_choice: choose the continuation of a passage, among its own next words and those of
  three other passages.
* heldout_bits: bits per byte of the beginnings of documents.
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

_VERSION = 2  # increment when the same text gives other questions
_QUESTIONS = 200  # per task, at most
_DOCUMENTS = 1000  # documents used at most, evenly spaced
_TOKENS = 50_000  # of each document, at most
_CONTEXT_WORDS, _NEXT_WORDS = 32, 8
_LETTERS = 5
_BITS_CHARACTERS = 1000
_PLACEHOLDER = "DIRECTORY"


class Passage(NamedTuple):
  """An excerpt of a document: `context`, and the `next` words with the space before them."""

  context: str
  next: str


def build(prepared: PreparedData, data_dir: str | os.PathLike,
          names: Sequence[str] = NAMES) -> pathlib.Path:
  """Returns the directory with the tasks' files, and writes them if they are missing or stale.

  Args:
    prepared: the text of a run.
    data_dir: <out>/_data, local or remote.
    names: tasks that must have questions; a task without any has no files.

  Raises:
    FieldError: the held-out documents yield no question for one of `names`.
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
                       "document(s) are too few or too short to make a question")
  return directory


def make(texts: Sequence[str]) -> dict[str, list[Mapping]]:
  """Makes the questions of each task from the texts of documents."""
  found = _first_by_hash({passage for text in texts for passage in passages(text)})
  clozes = [question for passage in found if (question := cloze(passage)) is not None]
  beginnings = {text[:_BITS_CHARACTERS] for text in texts if text.strip()}
  return {
      "heldout_cloze": clozes[:_QUESTIONS],
      "heldout_choice": choices(found[:_QUESTIONS]),
      "heldout_bits": [{"text": text} for text in _first_by_hash(beginnings)[:_QUESTIONS]]}


def documents(prepared: PreparedData) -> Iterator[str]:
  """Yields the texts of evenly spaced held-out documents, truncated to _TOKENS tokens."""
  split = prepared.splits["heldout"]
  count = min(_DOCUMENTS, split.n_documents)
  for number in np.linspace(0, split.n_documents - 1, count).astype(int):
    start, end = split.starts_D1[number:number + 2]
    yield prepared.tokenizer.decode(split.tokens_N[start:min(end, start + _TOKENS)])


def passages(text: str) -> Iterator[Passage]:
  """Yields consecutive passages.

  Skips those whose `next` is not on the same line after a single space, or that contain U+FFFD.
  """
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
  """Cuts a passage before the last of its next words that also occurs earlier.

  Returns the text before that word, and the word; None if there is no such word.
  """
  whole = passage.context + passage.next
  for found in reversed(list(re.finditer(rf" ([^\W\d_]{{{_LETTERS},}})\b", whole))):
    if found.start() < len(passage.context):
      return None
    if re.search(rf"\b{found[1]}\b", whole[:found.start()]):
      return {"context": whole[:found.start()], "target": found[0]}
  return None


def choices(found: Sequence[Passage]) -> list[dict]:
  """Makes a question of each passage: its next words among those of three others.

  The others follow it (cyclically). All four choices have _NEXT_WORDS words, so their lengths are
  similar. Returns no questions if there are fewer than four distinct `next`.
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
  """Sorts by hash: an order that is independent of the position in the text, and reproducible."""
  return sorted(found, key=_hash)


def _hash(value: str | Passage) -> bytes:
  return hashlib.sha256(json.dumps(value).encode()).digest()
