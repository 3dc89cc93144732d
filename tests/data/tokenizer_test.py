import dataclasses

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
