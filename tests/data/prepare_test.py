import collections
import errno
import json
import math
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from moe_jax.config import DataConfig
from moe_jax.data import corpus, encode, offline, tokenizer
from moe_jax.data import documents as documents_lib
from moe_jax.data.prepare import SPLITS, prepare
from moe_jax.data.tokenizer import train_bpe
from moe_jax.errors import FieldError

BYTES = DataConfig(corpus="tiny", tokenizer="bytes")
BPE = DataConfig(corpus="tiny", tokenizer="bpe-300")


def forbid_reading(monkeypatch, version="1.0.0"):
  """From here on the corpus cannot be built again."""
  def read():
    raise AssertionError("the corpus was read again")
  monkeypatch.setitem(corpus.CORPORA, "tiny", corpus.Corpus("tiny", version, read))


@pytest.mark.parametrize("data", [BYTES, BPE])
def test_tokens_give_back_every_document(data, tiny, tmp_path):
  prepared = prepare(data, tmp_path / "data")
  texts = {}
  for name in SPLITS:
    split = prepared.splits[name]
    assert split.starts_D1[0] == 0
    assert split.starts_D1[-1] == split.n_tokens
    for d in range(split.n_documents):
      document = split.tokens_N[split.starts_D1[d]:split.starts_D1[d + 1]]
      assert document[0] == prepared.document_start_id
      assert prepared.document_start_id not in document[1:]
      texts[name, d] = prepared.tokenizer.decode(document)
      assert len(texts[name, d].encode()) == split.bytes_D[d]
  train, heldout = documents_lib.hold_out(offline.read_folder(tiny))
  assert [texts["train", d] for d in range(len(train))] == [d.text for d in train]
  assert [texts["heldout", d] for d in range(len(heldout))] == [d.text for d in heldout]
  assert (len(train), len(heldout)) == (19, 1)
  assert prepared.splits["train"].tokens_N.dtype == np.uint16
  assert prepared.vocab_size == prepared.tokenizer.vocab_size


def test_the_card_counts_and_gives_the_unigram_loss(tiny, tmp_path):
  (tiny / "copy.txt").write_bytes((tiny / "document-03.txt").read_bytes().upper())
  prepared = prepare(BYTES, tmp_path / "data")
  card = json.loads((prepared.directory / "card.json").read_text())
  assert card == prepared.card
  (domain,) = card["domains"]
  assert (domain["corpus"], domain["label"]) == ("tiny", "tiny")
  assert domain["splits"] == card["splits"]
  assert domain["left_out"] == {"duplicates": 1}
  assert {domain["duplicates"][0]["id"], domain["duplicates"][0]["of"]} == {
      "copy", "document-03"}
  counts = collections.Counter(prepared.splits["train"].tokens_N.tolist())
  for name in SPLITS:
    split, described = prepared.splits[name], card["splits"][name]
    assert described["documents"] == split.n_documents
    assert described["tokens"] == len(split.tokens_N)
    assert described["bytes"] == split.n_bytes == split.n_tokens - split.n_documents
    nats = [math.log((counts.total() + 257) / (counts[token] + 1))
            for token in split.tokens_N[1:].tolist()]
    assert described["unigram_nats_per_token"] == pytest.approx(np.mean(nats), abs=1e-6)
    assert described["unigram_bits_per_byte"] == pytest.approx(
        sum(nats) / math.log(2) / split.n_bytes, abs=1e-6)


def test_the_tokenizer_sees_the_train_split_alone(tiny, tmp_path):
  prepared = prepare(BPE, tmp_path / "data")
  train, _ = documents_lib.hold_out(offline.read_folder(tiny))
  train_bpe((d.text for d in train), 300, tmp_path / "expected.json")
  assert ((prepared.directory / "tokenizer.json").read_bytes()
          == (tmp_path / "expected.json").read_bytes())


def test_the_second_time_nothing_is_built(tiny, tmp_path, monkeypatch):
  first = prepare(BYTES, tmp_path / "data")
  forbid_reading(monkeypatch)
  second = prepare(BYTES, tmp_path / "data")
  assert second.card == first.card
  assert prepare(BPE, tmp_path / "data").fingerprint != first.fingerprint  # shares the text


def test_the_fingerprint_depends_on_the_texts(tiny, tmp_path):
  first = prepare(BYTES, tmp_path / "one")
  assert prepare(BYTES, tmp_path / "two").fingerprint == first.fingerprint
  with (tiny / "document-00.txt").open("a") as file:
    file.write("!")
  assert prepare(BYTES, tmp_path / "three").fingerprint != first.fingerprint


def test_another_version_of_the_corpus_is_built_anew(tiny, tmp_path, monkeypatch):
  prepare(BYTES, tmp_path / "data")
  (tiny / "document-20.txt").write_text("a wholly new document about something else")
  monkeypatch.setitem(corpus.CORPORA, "tiny", corpus.Corpus(
      "tiny", "1.0.1", lambda: offline.read_folder(tiny)))
  splits = prepare(BYTES, tmp_path / "data").splits
  assert sum(splits[name].n_documents for name in SPLITS) == 21


@pytest.mark.parametrize("setting, value, documents", [
    ("HELDOUT_FRACTION", 0.25, {"train": 15, "heldout": 5}),
    ("SHINGLE_WORDS", 1, None), ("DUPLICATE_SHARE", 0.0, None)])
def test_another_selection_of_documents_is_made_anew(setting, value, documents, tiny, tmp_path,
                                                     monkeypatch, caplog):
  first = [prepare(data, tmp_path / "data") for data in (BYTES, BPE)]
  monkeypatch.setattr(documents_lib, setting, value)
  if documents is None:  # all but one are duplicates now: the data of before are no way out
    with pytest.raises(FieldError, match="needs at least two"):
      prepare(BYTES, tmp_path / "data")
    return
  for data, old in zip((BYTES, BPE), first, strict=True):
    again = prepare(data, tmp_path / "data")
    assert f"{again.directory} was built from different inputs" in caplog.text
    assert {name: again.splits[name].n_documents for name in SPLITS} == documents
    assert again.fingerprint != old.fingerprint
    assert again.fingerprint == prepare(data, tmp_path / "clean").fingerprint
  assert f"{tmp_path / 'data/tiny/dataset'} was built from different inputs" in caplog.text


def cut(file):
  file.write_bytes(file.read_bytes()[:-10])


def flip(file):
  content = bytearray(file.read_bytes())
  content[-7] ^= 1
  file.write_bytes(content)


FILES = ["train_tokens.npy", "heldout_starts.npy", "card.json", "tokenizer.json"]


@pytest.mark.parametrize("damage, name", [
    *((damage, name) for damage in (cut, flip, os.unlink) for name in FILES),
    (cut, "files.json"), (os.unlink, "files.json")])
def test_damage_is_noticed_and_repaired(name, damage, tiny, tmp_path, caplog):
  first = prepare(BPE, tmp_path / "data")
  tokens = np.array(first.splits["train"].tokens_N)
  damage(first.directory / name)
  again = prepare(BPE, tmp_path / "data")
  assert ": rebuilding it" in caplog.text
  assert again.fingerprint == first.fingerprint
  assert np.array_equal(again.splits["train"].tokens_N, tokens)
  caplog.clear()
  prepare(BPE, tmp_path / "data")
  assert not caplog.text


def test_a_damaged_dataset_is_not_tokenized(tiny, tmp_path, caplog):
  first = prepare(BYTES, tmp_path / "data")
  (records,) = (tmp_path / "data/tiny/dataset").rglob("*train.array_record*")
  flip(records)
  prepare(BPE, tmp_path / "data")
  assert "with changed content" in caplog.text
  os.unlink(first.directory / "files.json")
  assert prepare(BYTES, tmp_path / "data").fingerprint == first.fingerprint


# In a process of its own: registers the corpus `tiny`, notes each reading, and may be
# killed where a result is written.
PROCESS = """
import os, pathlib, signal, sys
import numpy as np
from moe_jax.config import DataConfig
from moe_jax.data import cache, corpus, offline
from moe_jax.data import documents as documents_lib
from moe_jax.data.prepare import prepare

texts, data_dir, die_at = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3]

def die(*args, **kwargs):
  os.kill(os.getpid(), signal.SIGKILL)

def read():
  with open(data_dir + ".reads", "a") as file:
    file.write("read\\n")
  documents = offline.read_folder(texts)
  if die_at == "dataset":
    from moe_jax.data import builder
    documents[15] = documents_lib.Document("bomb", "another text", "bomb")
    generate = builder.TextBuilder._generate_examples
    builder.TextBuilder._generate_examples = lambda self, found: (
        die() if d.id == "bomb" else e for d, e in zip(found, generate(self, found)))
  return documents

corpus.CORPORA["tiny"] = corpus.Corpus("tiny", "1.0.0", read)
if die_at == "part":
  write = cache.write_whole
  cache.write_whole = lambda file, *a: (die if "part-00001" in str(file) else write)(file, *a)
if die_at == "join":
  header = np.lib.format.write_array_header_1_0
  np.lib.format.write_array_header_1_0 = lambda file, d: (
      die if "heldout_starts" in str(file.name) else header)(file, d)
if die_at == "manifest":
  write_manifest = cache._write_manifest
  cache._write_manifest = lambda directory, key: (
      die if "bpe" in str(directory) else write_manifest)(directory, key)
print(prepare(DataConfig("tiny", "bpe-300"), data_dir).fingerprint)
print(*sorted({"tensorflow_datasets", "tokenizers", "jax", "grain"} & set(sys.modules)))
"""


def start(tiny, data_dir, die_at="never"):
  return subprocess.Popen([sys.executable, "-c", PROCESS, str(tiny), str(data_dir), die_at],
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("die_at", ["dataset", "part", "join", "manifest"])
def test_a_killed_preparation_leaves_nothing_that_is_trusted(die_at, tiny, tmp_path, monkeypatch):
  process = start(tiny, tmp_path / "data", die_at)
  _, errors = process.communicate()
  assert process.returncode == -signal.SIGKILL, errors
  assert list((tmp_path / "data").rglob("*.partial"))
  clean = prepare(BPE, tmp_path / "clean").fingerprint
  if die_at != "dataset":  # then the tokenizer is trained, and at least one shard encoded
    monkeypatch.setattr(tokenizer, "train_bpe", None)
    encoded, encode_shard = [], encode._encode_shard
    monkeypatch.setattr(encode, "_encode_shard", lambda *arguments: (
        encoded.append(arguments[-1].name), encode_shard(*arguments)))
  killed_then_done = prepare(BPE, tmp_path / "data")
  assert killed_then_done.fingerprint == clean
  assert not list((tmp_path / "data").rglob("*.partial"))
  assert not list((tmp_path / "data").rglob("*.scratch"))
  if die_at != "dataset":
    assert encoded == (["part-00001.npz"] if die_at == "part" else [])


def test_processes_that_start_at_once_build_once(tiny, tmp_path):
  processes = [start(tiny, tmp_path / "data") for _ in range(4)]
  results = [process.communicate() for process in processes]
  assert all(process.returncode == 0 for process in processes), results
  assert len({out.splitlines()[0] for out, _ in results}) == 1
  assert (tmp_path / "data.reads").read_text() == "read\n"
  out, _ = start(tiny, tmp_path / "data").communicate()
  assert out.splitlines()[1] == ""  # a warm start imports none of the slow libraries


def test_bad_input_is_refused_before_anything_is_written(tiny, tmp_path):
  (tmp_path / "file").write_text("")
  for data, place, message in [
      (DataConfig(corpus="tinny"), tmp_path / "data", r"data\.corpus='tinny': .*'tiny'"),
      (BYTES, tmp_path / "file", "^out=.*cannot be prepared: .*Not a directory")]:
    with pytest.raises(FieldError, match=message) as caught:
      prepare(data, place)
    assert "\n" not in str(caught.value)
  assert not (tmp_path / "data").exists()


def test_a_full_disk_is_one_line_and_leaves_the_way_free(tiny, tmp_path, monkeypatch):
  def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
  with monkeypatch.context() as patch, pytest.raises(
      FieldError, match="^out=.*cannot be prepared: .*No space left on device"):
    patch.setattr(np.lib.format, "write_array_header_1_0", full)
    prepare(BYTES, tmp_path / "data")
  assert prepare(BYTES, tmp_path / "data").card["splits"]["train"]["documents"] == 19


@pytest.mark.parametrize("texts, count", [([], 0), (["", "\n \n"], 0), (["one text"], 1),
                                          (["one text", "One  text."], 1)])
def test_an_empty_corpus_is_refused(texts, count, tmp_path, monkeypatch):
  (tmp_path / "texts").mkdir()
  for index, text in enumerate(texts):
    (tmp_path / "texts" / f"{index}.txt").write_text(text)
  monkeypatch.setitem(corpus.CORPORA, "tiny", corpus.Corpus(
      "tiny", "1.0.0", lambda: offline.read_folder(tmp_path / "texts")))
  with pytest.raises(FieldError) as caught:
    prepare(BYTES, tmp_path / "data")
  assert str(caught.value).startswith(
      f"data.corpus='tiny': has {count} document(s): needs at least two")
  assert "\n" not in str(caught.value)


def command(tmp_path, *arguments):
  return subprocess.run(
      [sys.executable, "-m", "moe_jax.data", f"--data_dir={tmp_path / 'data'}", *arguments],
      capture_output=True, text=True, check=False)


def test_the_command_prints_the_card(tmp_path):
  done = command(tmp_path, "--corpus=sotu", "--tokenizer=bytes")
  assert done.returncode == 0, done.stderr
  card = json.loads(done.stdout)
  assert card["splits"]["train"]["documents"] == 234
  assert card["splits"]["heldout"]["documents"] == 13
  # Written down so that a change to the corpus, the split or the tokens shows.
  assert card["fingerprint"] == "084e010db80d0b4e"
  assert len(done.stderr.splitlines()) == 1  # what it is doing, and no chatter of TFDS


@pytest.mark.parametrize("argument, message", [
    ("--corpus=stou", "--corpus='stou': no such corpus; did you mean 'sotu'"),
    ("--corpus=sotu:nan,python:1", "--corpus='sotu:nan,python:1': the weight of 'sotu' is 'nan'"),
    ("--corpus=sotu:0,python:1", "--corpus='sotu:0,python:1': the weight of 'sotu' is '0'"),
    ("--from=x.txt", "--from=['x.txt']: can only be used with --add=NAME"),
    ("--tokenizer=no/tokenizer.json", "--tokenizer='no/tokenizer.json': no such file"),
    ("--tokenizer=mine-0123abcd", "--tokenizer='mine-0123abcd': no such tokenizer"),
    ("--tokenizer=bpe-12", "--tokenizer='bpe-12': must be 'bytes' or 'bpe-N'"),
    ("--config.train.steps=5", "--config.train.steps='5': is not a flag of this command"),
    ("--data_dir=gs://bucket", "--data_dir='gs://bucket': must be a local path"),
    ("--data_dir=/dev/null", "--data_dir='/dev/null/sotu/bytes': cannot be prepared")])
def test_the_command_refuses_bad_input_in_one_line(argument, message, tmp_path):
  done = command(tmp_path, argument)
  assert done.returncode == 2
  (line,) = done.stderr.splitlines()
  assert line.startswith(f"error: {message}")
  assert not done.stdout


def test_the_command_adds_a_text_and_takes_a_tokenizer(tiny, tmp_path):
  (tmp_path / "mine").mkdir()
  train_bpe(iter(["the union of the states"] * 3), 280, tmp_path / "mine" / "tokenizer.json")
  done = command(tmp_path, "--add=own", f"--from={tiny}", "--domain=speech")
  assert done.returncode == 0, done.stderr
  card = json.loads(done.stdout)
  assert (card["corpus"], card["domain"]) == ("own", "speech")
  assert sum(split["documents"] for split in card["splits"].values()) == 20
  assert command(tmp_path, "--add=own", f"--from={tiny}", "--domain=speech").stdout == done.stdout
  done = command(tmp_path, "--corpus=own", f"--tokenizer={tmp_path / 'mine' / 'tokenizer.json'}")
  assert done.returncode == 0, done.stderr
  card = json.loads(done.stdout)
  assert card["tokenizer"].startswith("mine-")
  prepared = prepare(DataConfig("own", card["tokenizer"]), tmp_path / "data")
  assert prepared.card == card
  (tmp_path / "bad.txt").write_bytes(b"caf\xe9")
  done = command(tmp_path, "--add=bad", f"--from={tmp_path / 'bad.txt'}")
  assert done.returncode == 2
  assert f"error: --from='{tmp_path / 'bad.txt'}': must be UTF-8 text" in done.stderr
