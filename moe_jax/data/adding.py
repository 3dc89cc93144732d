"""Builds a corpus from a user's text: `python -m moe_jax.data --add=NAME --from=FILES`.

The text is read twice, unit by unit, in several processes. The first pass checks and hashes every
document; the hashes decide which documents are duplicates and which are held out. The second pass
writes the documents that are kept as a TFDS dataset of array_record files. From then on this
dataset is the corpus: the files it was built from are no longer needed.

* A document is a duplicate if it equals an earlier one up to whitespace; the first is kept.
* A hash of its words decides whether a document is held out (selection.py). So a corpus that grows
  keeps its split, whatever the order of documents and files, and no copy of a held-out document is
  trained on.
* Empty documents are dropped. The card counts everything that was dropped.

If the command is killed at any point, running it again resumes with the unfinished units.
"""

import dataclasses
import functools
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
from absl import logging

from moe_jax.data import cache, documents, pool, readers, selection, sources
from moe_jax.data import corpus as corpus_lib
from moe_jax.data.sources import Plan, Source, Unit
from moe_jax.errors import require
from moe_jax.files import is_local, write_json
from moe_jax.sections import NAME

_FORMAT = 1  # bump when the same text gives a different dataset


def add(name: str, source: Source, data_dir: str | os.PathLike, *, domain: str | None = None,
        heldout_fraction: float = documents.HELDOUT_FRACTION,
        processes: int | None = None) -> dict[str, Any]:
  """Adds a corpus under a name that `data.corpus` then accepts; returns its card.

  A no-op if the corpus already exists and its source is unchanged.

  Args:
    name: lower-case letters, digits, '.', '_' and '-'.
    source: where the text is.
    data_dir: the directory of prepared data, <out>/_data.
    domain: label under which the corpus's losses are reported; its name if None.
    heldout_fraction: share of the documents to hold out.
    processes: number of processes that read; one per available core if None.

  Raises:
    FieldError: an argument or the text is invalid, or the name is taken by another text.
  """
  require(re.fullmatch(NAME, name) is not None, "add", name,
          "must be lower-case letters and digits, with single '.', '_' or '-' between them")
  require(name not in corpus_lib.CORPORA, "add", name, "is the name of a corpus that is built in")
  domain = name if domain is None else domain
  require(re.fullmatch(NAME, domain) is not None, "domain", domain,
          "must be lower-case letters and digits, with single '.', '_' or '-' between them")
  require(0 < heldout_fraction < 1, "heldout_fraction", heldout_fraction,
          "must lie between 0 and 1, both excluded")
  require(is_local(data_dir), "out", os.fspath(data_dir),
          "must be a local path")
  plan = sources.make_plan(source)
  directory = pathlib.Path(data_dir) / name / "dataset"
  key = {"format": _FORMAT, "corpus": name, "source": plan.signature, "domain": domain,
         "heldout_fraction": heldout_fraction}
  _check_free(directory, key)
  cache.obtain_in_parts(directory, key, functools.partial(
      _build, name, source, plan, key, processes or pool.default_processes()))
  return corpus_lib.read_added(directory).card


def _check_free(directory: pathlib.Path, key: dict[str, Any]) -> None:
  """Raises FieldError if the name is taken by another text: runs may have been trained on it."""
  if not (directory / cache.MANIFEST).exists():
    return
  theirs = corpus_lib.read_added(directory).built_from
  differing = [field for field in key if theirs.get(field) != key[field]]
  require(not differing, "add", key["corpus"], "already exists, with another "
          + ", ".join(field.replace("_", " ") for field in differing)
          + f": choose another name, or remove {directory.parent} first")


def _build(name: str, source: Source, plan: Plan, key: dict[str, Any], processes: int,
           partial: pathlib.Path, scratch: pathlib.Path) -> None:
  from moe_jax.data import dataset  # imports TFDS
  # Checked again under the lock: another process may have taken the name in the meantime.
  _check_free(partial.parent / "dataset", key)
  logging.info("Reading %s: %d unit(s) of text", name, len(plan.units))
  numbers, sizes = range(len(plan.units)), [sum(p.size for p in unit) for unit in plan.units]
  notes = [scratch / f"notes-{number:05d}.npy" for number in numbers]
  pool.run(f"{name}: reading", _note_unit, [
      pool.Job(notes[n], sizes[n], (plan.units[n], source, notes[n])) for n in numbers], processes)
  decisions_N = _decide(source, notes, key["heldout_fraction"], scratch / "decisions.npy")

  home = partial / dataset.tfds_name(name) / corpus_lib.ADDED_VERSION
  home.mkdir(parents=True, exist_ok=True)
  starts = np.cumsum([0, *(len(selection.load(file)) for file in notes)]).tolist()

  def job(number: int) -> pool.Job:
    done = scratch / f"written-{number:05d}"
    shards = {split: dataset.shard_path(home, dataset.tfds_name(name), split, number, len(numbers))
              for split in dataset.SPLITS}
    return pool.Job(done, sizes[number], (
        plan.units[number], source, scratch / "decisions.npy",
        slice(starts[number], starts[number + 1]), shards, done))

  pool.run(f"{name}: writing", _write_unit, [job(number) for number in numbers], processes)
  card = _describe(name, source, key, notes, decisions_N)
  lengths = {split: [int((decisions == side).sum())
                     for _, decisions in selection.by_file(notes, decisions_N)]
             for split, side in selection.SIDES.items()}
  dataset.write_metadata(home, dataset.tfds_name(name), lengths, {
      split: card["splits"][split]["bytes"] for split in lengths})
  write_json(partial / corpus_lib.CARD, card)


def _decide(source: Source, notes: list[pathlib.Path], heldout_fraction: float,
            file: pathlib.Path) -> np.ndarray:
  """Loads the decisions from `file`, after computing and saving them if it is missing.

  Raises:
    FieldError: fewer than two documents are kept.
  """
  if not file.exists():
    decisions_N = selection.decide(notes, heldout_fraction)
    left = int((decisions_N >= selection.TRAIN).sum())
    require(left >= 2, *source.given, f"has {left} document(s): at least two different ones with "
            "text are needed, one to train on and one to hold out")
    cache.write_whole(file, lambda opened: np.save(opened, decisions_N))
  return np.load(file, mmap_mode="r")


def _read(unit: Unit, source: Source) -> Iterator[tuple[str, str]]:
  for piece in unit:
    yield from readers.read_piece(piece, source)


def _note_unit(unit: Unit, source: Source, file: pathlib.Path) -> None:
  """First pass over a unit: checks each document and saves its selection.NOTE."""
  notes = []
  for name, text in _read(unit, source):
    n_bytes = len(text.encode())
    readers.check_size(name, n_bytes)
    notes.append(selection.note(text, n_bytes))
  cache.write_whole(file, lambda opened: np.save(opened, np.array(notes, selection.NOTE)))


def _write_unit(unit: Unit, source: Source, decisions_file: pathlib.Path, where: slice,
                shards: dict[str, pathlib.Path], done: pathlib.Path) -> None:
  """Second pass over a unit: writes the documents that are kept, one file per split."""
  from moe_jax.data import dataset
  decisions = np.load(decisions_file, mmap_mode="r")[where]
  count = 0
  with (dataset.ShardWriter(shards["train"]) as train,
        dataset.ShardWriter(shards["heldout"]) as heldout):
    writers = {selection.TRAIN: train, selection.HELDOUT: heldout}
    for name, text in _read(unit, source):
      writer = writers.get(int(decisions[count])) if count < len(decisions) else None
      if writer is not None:
        writer.write(name, text)
      count += 1
    require(count == len(decisions), source.given[0], unit[0].path, "changed while it was being "
            "read: run the command again")
  cache.write_whole(done, lambda file: None)


def _describe(name: str, source: Source, key: dict[str, Any], notes: list[pathlib.Path],
              decisions_N: np.ndarray) -> dict[str, Any]:
  """Returns the corpus's card."""
  n_bytes = dict.fromkeys(selection.SIDES, 0)
  for found, decisions in selection.by_file(notes, decisions_N):
    for split, side in selection.SIDES.items():
      n_bytes[split] += int(found["bytes"][decisions == side].sum())
  counts = np.bincount(decisions_N, minlength=4).tolist()
  return {
      "corpus": name, "domain": key["domain"],
      "fingerprint": selection.fingerprint(notes, decisions_N),
      "splits": {split: {"documents": counts[side], "bytes": n_bytes[split]}
                 for split, side in selection.SIDES.items()},
      "left_out": {"empty": counts[selection.EMPTY], "duplicates": counts[selection.DUPLICATE]},
      "heldout_fraction": key["heldout_fraction"], "source": dataclasses.asdict(source)}
