"""Corpora made of a user's text: the same however they are read, killed or grown."""

import collections
import gzip
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from moe_jax.config import DataConfig
from moe_jax.data import adding, cache, corpus, dataset, encode, pool, sources
from moe_jax.data.prepare import prepare
from moe_jax.data.sources import Source
from moe_jax.errors import FieldError
from tests.data.conftest import TEXT


def make_texts(count=120, seed=0):
  draw = random.Random(seed)
  return [f"{number} " + " ".join(draw.choices(TEXT.split(), k=30)) for number in range(count)]


def write_json(file, texts):
  file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
  return Source((str(file),))


def stored(data_dir, name, split):
  """The texts of a split of an added corpus."""
  home = corpus.get_corpus(name, data_dir).obtain(data_dir / name)
  return [text for shard in dataset.list_shards(home, split)
          for _, text in dataset.read_shard(shard)]


@pytest.fixture
def small_units(monkeypatch):
  """Units of a few documents, so that a small corpus has many; worked on by several."""
  monkeypatch.setattr(sources, "UNIT_BYTES", 4000)
  monkeypatch.setattr(pool, "_ALONE_BYTES", 0)


def write_tfds(folder, texts):
  """A TFDS dataset as others make them: more features, another split."""
  import tensorflow_datasets as tfds
  from array_record.python import array_record_module
  home = folder / "wiki" / "2.0.0"
  home.mkdir(parents=True)
  features = tfds.features.FeaturesDict({
      "title": tfds.features.Text(), "text": tfds.features.Text(),
      "count": np.int64})
  template = tfds.core.ShardedFileTemplate(
      data_dir=home, template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
      dataset_name="wiki", filetype_suffix="array_record")
  lengths = []
  for number, part in enumerate((texts[:50], texts[50:])):
    writer = array_record_module.ArrayRecordWriter(
        str(home / f"wiki-train.array_record-{number:05d}-of-00002"), "group_size:1")
    for text in part:
      writer.write(features.serialize_example({"title": "t", "text": text, "count": 1}))
    writer.close()
    lengths.append(len(part))
  tfds.folder_dataset.write_metadata(
      data_dir=home, features=features, version="2.0.0", check_data=False,
      filename_template=template, split_infos=[tfds.core.SplitInfo(
          name="train", shard_lengths=lengths, num_bytes=1, filename_template=template)])
  return Source(tfds="wiki", tfds_dir=str(folder))


def sources_of(folder, texts):
  """The same texts in every form."""
  (folder / "texts").mkdir()
  for number, text in enumerate(texts):
    (folder / "texts" / f"{number:04d}.txt").write_text(text)
  (folder / "all.txt").write_text("<|end|>\n".join(texts))
  with gzip.open(folder / "all.jsonl.gz", "wt") as file:
    file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
  pyarrow.parquet.write_table(pyarrow.table({"body": texts}), folder / "all.parquet",
                              row_group_size=13)
  return {
      "text": Source((str(folder / "texts"),)),
      "separated": Source((str(folder / "all.txt"),), separator="<|end|>"),
      "json": write_json(folder / "all.jsonl", texts),
      "compressed": Source((str(folder / "all.jsonl.gz"),)),
      "parquet": Source((str(folder / "*.parquet"),), text_field="body"),
      "tfds": write_tfds(folder / "tfds", texts)}


def test_the_corpus_is_the_same_in_every_form(tmp_path, small_units):
  texts = make_texts()
  cards = {name: adding.add(name, source, tmp_path / "data", processes=1)
           for name, source in sources_of(tmp_path, texts).items()}
  assert len({card["fingerprint"] for card in cards.values()}) == 1
  for name, card in cards.items():
    assert card["corpus"] == card["domain"] == name
    found = {split: stored(tmp_path / "data", name, split) for split in ("train", "heldout")}
    assert sorted(found["train"] + found["heldout"]) == sorted(texts)
    assert found["train"] == [text for text in texts if text in set(found["train"])]
    for split, described in card["splits"].items():
      assert described == {"documents": len(found[split]),
                           "bytes": sum(len(text.encode()) for text in found[split])}


def test_several_processes_make_the_same_bit_for_bit(tmp_path, small_units):
  source = write_json(tmp_path / "a.jsonl", make_texts())
  for processes in (1, 3):
    adding.add("mine", source, tmp_path / str(processes), processes=processes)
  one, three = (prepare(DataConfig("mine", "bpe-300"), tmp_path / str(processes), processes)
                for processes in (1, 3))
  names = sorted(file.relative_to(one.directory.parent) for file in
                 one.directory.parent.rglob("*") if file.is_file())
  assert any("00003-of-00007" in str(name) for name in names)
  for name in names:
    ours, theirs = ((found.directory.parent / name).read_bytes() for found in (one, three))
    assert ours == theirs, name


def test_the_size_of_units_changes_nothing_but_files(tmp_path, monkeypatch):
  source = write_json(tmp_path / "a.jsonl", make_texts())
  prepared = []
  for size in (1000, 10**9):
    monkeypatch.setattr(sources, "UNIT_BYTES", size)
    adding.add("mine", source, tmp_path / str(size), processes=1)
    prepared.append(prepare(DataConfig("mine", "bytes"), tmp_path / str(size), 1))
  assert prepared[0].fingerprint == prepared[1].fingerprint


def test_what_is_left_out_is_counted_and_no_copy_is_on_both_sides(tmp_path):
  texts = make_texts(40)
  copies = [text.replace(" ", "  ") + "\n" for text in texts]
  source = write_json(tmp_path / "a.jsonl", [*texts, "", " \n", *copies, *texts[:5]])
  card = adding.add("mine", source, tmp_path, heldout_fraction=0.3)
  assert card["left_out"] == {"empty": 2, "duplicates": 45}
  found = [stored(tmp_path, "mine", split) for split in ("train", "heldout")]
  assert sorted(found[0] + found[1]) == sorted(texts)
  assert len(found[1]) == card["splits"]["heldout"]["documents"] > 5
  assert card["heldout_fraction"] == 0.3
  (domain,) = prepare(DataConfig("mine"), tmp_path).card["domains"]
  assert domain["left_out"] == card["left_out"]


def test_a_corpus_that_grows_keeps_its_split(tmp_path):
  texts = make_texts(200)
  small = write_json(tmp_path / "small.jsonl", texts[:100])
  large = write_json(tmp_path / "large.jsonl", texts[::-1])
  for name, source in (("fewer", small), ("more", large)):
    adding.add(name, source, tmp_path, heldout_fraction=0.2)
  for split in ("train", "heldout"):
    ours, theirs = set(stored(tmp_path, "fewer", split)), set(stored(tmp_path, "more", split))
    assert ours == theirs & set(texts[:100])


@pytest.mark.parametrize("fraction, heldout", [(1e-9, 1), (1 - 1e-9, 4)])
def test_one_document_at_least_is_on_each_side(fraction, heldout, tmp_path):
  source = write_json(tmp_path / "a.jsonl", make_texts(5))
  card = adding.add("mine", source, tmp_path, heldout_fraction=fraction)
  assert card["splits"]["heldout"]["documents"] == heldout


def test_adding_again_does_nothing_and_another_text_is_refused(tmp_path, monkeypatch):
  source = write_json(tmp_path / "a.jsonl", make_texts(10))
  card = adding.add("mine", source, tmp_path, domain="code")
  with monkeypatch.context() as patch:
    patch.setattr(adding, "_build", lambda *_: pytest.fail("it was read again"))
    assert adding.add("mine", source, tmp_path, domain="code") == card
    with pytest.raises(FieldError, match="add='mine': already exists, with another domain:"):
      adding.add("mine", source, tmp_path)
    write_json(tmp_path / "a.jsonl", make_texts(11))
    with pytest.raises(FieldError, match="with another source: choose another name, or remove"):
      adding.add("mine", source, tmp_path, domain="code")
  os.unlink(tmp_path / "a.jsonl")  # not needed any more
  assert prepare(DataConfig("mine"), tmp_path).domains[0].label == "code"


def test_what_is_left_behind_a_rename_does_not_hinder_a_repair(tmp_path, monkeypatch):
  """As of a process that ended between the rename and the end."""
  source = write_json(tmp_path / "a.jsonl", make_texts(10))
  with monkeypatch.context() as patch:
    real = shutil.rmtree
    patch.setattr(cache.shutil, "rmtree", lambda path, *more, **how: None if str(path).endswith(
        ".scratch") else real(path, *more, **how))
    card = adding.add("left", source, tmp_path)
  made = tmp_path / "left" / "dataset"
  assert made.with_name(".dataset.scratch").exists()
  next(made.rglob("*.array_record*")).unlink()
  assert adding.add("left", source, tmp_path) == card
  assert len(list(made.rglob("*.array_record*"))) == 2


def test_a_name_that_another_process_takes_meanwhile_is_refused(tmp_path, monkeypatch):
  first, second = (write_json(tmp_path / f"{seed}.jsonl", make_texts(10, seed)) for seed in (1, 2))
  real, cards = cache.obtain_in_parts, []

  def obtain(directory, key, build):
    if not cards:
      cards.append(None)
      cards.append(adding.add("name", first, tmp_path))
    real(directory, key, build)

  monkeypatch.setattr(cache, "obtain_in_parts", obtain)
  with pytest.raises(FieldError, match="already exists, with another source"):
    adding.add("name", second, tmp_path)
  assert corpus.read_added(tmp_path / "name" / "dataset").card == cards[1]


def test_a_damaged_corpus_is_not_tokenized(tmp_path):
  source = write_json(tmp_path / "a.jsonl", make_texts(10))
  adding.add("mine", source, tmp_path)
  (shard,) = (tmp_path / "mine").rglob("*train.array_record*")
  content = bytearray(shard.read_bytes())
  content[len(content) // 2] ^= 1
  shard.write_bytes(content)
  with pytest.raises(FieldError, match=r"data\.corpus='mine': .* changed content: add it again"):
    prepare(DataConfig("mine"), tmp_path)
  adding.add("mine", source, tmp_path)
  prepare(DataConfig("mine"), tmp_path)
  (tmp_path / "mine" / "dataset" / "corpus.json").write_text("{")
  with pytest.raises(FieldError, match=r"data\.corpus='mine': .* is damaged: remove that folder"):
    prepare(DataConfig("mine", "bpe-300"), tmp_path)


def test_a_mixture_holds_its_corpora_one_after_the_other(tmp_path):
  texts = {name: make_texts(30, seed) for seed, name in enumerate(("b", "a"))}
  for name, found in texts.items():
    adding.add(name, write_json(tmp_path / f"{name}.jsonl", found), tmp_path,
               domain=f"domain-{name}")
  prepared = prepare(DataConfig("b:3,a:1", "bpe-300"), tmp_path)
  assert [(d.corpus, d.label, d.weight) for d in prepared.domains] == [
      ("a", "domain-a", 0.25), ("b", "domain-b", 0.75)]
  for split in ("train", "heldout"):
    found, expected = prepared.splits[split], []
    for number, name in enumerate(("a", "b")):
      expected += [(text, number) for text in stored(tmp_path, name, split)]
      described = prepared.card["domains"][number]["splits"][split]
      assert described["tokens"] == len(found.domain_tokens(number))
      assert described["documents"] == (found.domain_D == number).sum()
      assert described["bytes"] == found.bytes_D[found.domain_D == number].sum()
    decoded = [prepared.tokenizer.decode(found.tokens_N[first:last]) for first, last in zip(
        found.starts_D1[:-1], found.starts_D1[1:], strict=True)]
    assert list(zip(decoded, found.domain_D.tolist(), strict=True)) == expected
  again = prepare(DataConfig("a:0.5,b:0.5", "bpe-300"), tmp_path)  # the same files
  assert (again.directory, again.fingerprint) == (prepared.directory, prepared.fingerprint)


# In a process of its own, which is killed when it writes what ends with sys.argv[3].
PROCESS = """
import os, pathlib, signal, sys
from moe_jax.config import DataConfig
from moe_jax.data import adding, cache, dataset, sources
from moe_jax.data.prepare import prepare

file, data_dir, die_at = sys.argv[1:]
sources.UNIT_BYTES = 4000
replace = pathlib.Path.replace

def replace_or_die(self, target):
  if str(target).endswith(die_at):
    os.kill(os.getpid(), signal.SIGKILL)
  return replace(self, target)

pathlib.Path.replace = replace_or_die
adding.add("mine", sources.Source((file,)), data_dir, processes=1)
prepare(DataConfig("mine", "bpe-300"), data_dir, 1)
"""


@pytest.mark.parametrize("die_at, done_before", [
    ("notes-00002.npy", {"notes": 2}),
    pytest.param("decisions.npy", {"notes": 7}, marks=pytest.mark.slow),
    ("train.array_record-00003-of-00007", {"notes": 7, "written": 3}),
    pytest.param("heldout.array_record-00003-of-00007", {"notes": 7, "written": 3},
                 marks=pytest.mark.slow),
    pytest.param("corpus.json", {"notes": 7, "written": 7}, marks=pytest.mark.slow),
    ("part-00002.npz", {"notes": 7, "written": 7, "part": 2}),
    ("card.json", {"notes": 7, "written": 7, "part": 99})])
def test_killed_anywhere_it_goes_on_without_a_lost_or_doubled_document(
    die_at, done_before, tmp_path, small_units, monkeypatch):
  texts = make_texts()
  source = write_json(tmp_path / "a.jsonl", texts)
  killed = subprocess.run([sys.executable, "-c", PROCESS, *source.files, str(tmp_path / "data"),
                           die_at], capture_output=True, text=True)
  assert killed.returncode == -signal.SIGKILL, killed.stderr
  done = collections.Counter()

  def counted(function):
    def call(*arguments):
      done[pathlib.Path(arguments[-1]).name.partition("-")[0]] += 1
      function(*arguments)
    return call

  for module, name in ((adding, "_note_unit"), (adding, "_write_unit"),
                       (encode, "_encode_shard")):
    monkeypatch.setattr(module, name, counted(getattr(module, name)))
  adding.add("mine", source, tmp_path / "data", processes=1)
  prepared = prepare(DataConfig("mine", "bpe-300"), tmp_path / "data", 1)
  found = [stored(tmp_path / "data", "mine", split) for split in ("train", "heldout")]
  assert sorted(found[0] + found[1]) == sorted(texts)
  assert sum(split.n_documents for split in prepared.splits.values()) == len(texts)
  home = corpus.get_corpus("mine", tmp_path / "data").obtain(tmp_path / "data" / "mine")
  n_shards = sum(len(dataset.list_shards(home, split)) for split in ("train", "heldout"))
  for stage, count in (("notes", 7), ("written", 7), ("part", n_shards)):
    assert done[stage] == max(0, count - done_before.get(stage, 0)), stage
  assert not list((tmp_path / "data").rglob(".*.partial"))


@pytest.mark.parametrize("options, message", [
    ({"name": "Mine"}, "add='Mine': must be lower-case letters"),
    ({"name": "sotu"}, "add='sotu': is the name of a corpus that is built in"),
    ({"domain": "a b"}, "domain='a b': must be"),
    ({"heldout_fraction": 0.0}, "heldout_fraction=0.0: must lie between"),
    ({"heldout_fraction": float("nan")}, "heldout_fraction=nan: must lie between"),
    ({"data_dir": "gs://bucket/_data"}, "out='gs://bucket/_data': must be a local path"),
])
def test_bad_options_are_refused_before_anything_is_written(options, message, tmp_path):
  source = write_json(tmp_path / "a.jsonl", make_texts(10))
  with pytest.raises(FieldError, match=message):
    adding.add(**{"name": "mine", "source": source, "data_dir": tmp_path / "data"} | options)
  assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("texts, count", [([], 0), (["", " "], 0), (["a b", "a  b"], 1)])
def test_too_little_text_is_refused(texts, count, tmp_path):
  source = write_json(tmp_path / "a.jsonl", texts)
  with pytest.raises(FieldError, match=rf"from='.*a.jsonl': has {count} document\(s\): at least"):
    adding.add("mine", source, tmp_path / "data")


def test_a_tfds_dataset_with_too_little_text_is_named_by_its_own_flag(tmp_path):
  source = write_tfds(tmp_path, ["a"] * 4)
  with pytest.raises(FieldError, match=r"tfds='wiki': has 1 document\(s\): at least two"):
    adding.add("mine", source, tmp_path / "data")


@pytest.mark.parametrize("change, message", [
    ({"tfds": "wikki"}, r"tfds='wikki': no such dataset.* in .*; did you mean 'wiki'\?$"),
    ({"tfds": "wiki:3.0.0"}, "tfds='wiki:3.0.0': no such dataset, version or conf"),
    ({"tfds": "not a name"}, "tfds='not a name': no such dataset"),
    ({"tfds_dir": "nowhere"}, "tfds_dir='nowhere': is not a directory"),
    ({"tfds_split": "test"},
     "tfds_split='test': is not a split of wiki in .*; one of train is accepted"),
    ({"text_field": "txt"}, r"text_field='txt': is not a feature of wiki .*did you mean 'text'"),
    ({"text_field": "count"}, "text_field='count': is a feature of int64"),
])
def test_a_tfds_dataset_that_is_not_there_is_refused_in_one_line(change, message, tmp_path):
  source = write_tfds(tmp_path, make_texts(60))
  with pytest.raises(FieldError, match=message) as caught:
    adding.add("mine", Source(**{**source.__dict__, **change}), tmp_path / "data")
  assert len(str(caught.value)) < 300 and "\n" not in str(caught.value)


def test_a_remote_shard_without_examples_is_read(monkeypatch):
  monkeypatch.setattr(sources, "is_local", lambda path: False)
  empty = sources.Piece("shard", "shard", "tfds", 0, 0, 100)
  found = sources._cut(empty, Source(tfds="a", tfds_dir="b"), 1)
  assert [(piece.start, piece.stop) for piece in found] == [(0, 0)]


def test_shards_that_are_missing_or_damaged_are_named(tmp_path):
  source = write_tfds(tmp_path, make_texts(60))
  shard = next((tmp_path / "wiki").rglob("*00001-of-00002"))
  content = shard.read_bytes()
  shard.write_bytes(content[:100])
  with pytest.raises(FieldError, match="from='.*00001-of-00002': is damaged"):
    adding.add("mine", source, tmp_path / "data")
  shard.unlink()
  with pytest.raises(FieldError, match="tfds='wiki': lacks 1 of the 2 files .*00001-of-00002"):
    adding.add("mine", source, tmp_path / "data")
