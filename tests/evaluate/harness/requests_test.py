"""Requests in text: how they become tokens, and what ends what is generated."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.data import tokenizer
from moe_jax.data.tokenizer import ByteTokenizer, FileTokenizer
from moe_jax.errors import FieldError
from moe_jax.evaluate.harness import requests
from moe_jax.evaluate.harness.requests import Answerer, cut, encode_pair, parse_generation, windows
from moe_jax.evaluate.sampling import Sampling
from tests.evaluate.harness.models import CONTEXT, decoder_of, teacher_of

BYTES = ByteTokenizer()


@pytest.fixture(scope="module")
def decoder():
  return decoder_of()


@pytest.fixture(scope="module")
def answerer(decoder):
  return Answerer(decoder, BYTES)


def test_spaces_at_the_end_of_a_context_go_with_the_continuation():
  start = BYTES.document_start_id
  assert encode_pair(BYTES, "ab  ", "c") == ([start, *b"ab"], list(b"  c"))
  assert encode_pair(BYTES, "", " c") == ([start], list(b" c"))


def test_context_and_continuation_are_cut_into_tokens_together(tmp_path):
  """A tokenizer whose words hold the space before them, in one token."""
  tokenizer.train_bpe(iter(["alpha beta gamma " * 50]), 300, tmp_path / "tokenizer.json")
  words = FileTokenizer(tmp_path / "tokenizer.json")
  whole = words.encode("alpha beta").tolist()
  before, after = encode_pair(words, "alpha ", "beta")
  assert before == [words.document_start_id, *words.encode("alpha").tolist()]
  assert after == whole[len(before) - 1:] and words.decode(after) == " beta"


@settings(max_examples=80, deadline=None)
@given(n_tokens=st.integers(0, 60), context=st.integers(2, 20))
def test_windows_score_each_token_once_behind_as_much_as_fits(n_tokens, context):
  tokens = list(range(n_tokens))
  made = windows(tokens, -1, context)
  assert [token for _, after in made for token in after] == tokens
  for before, after in made:
    assert before and len(before) + len(after) <= context + 1
    first = ([-1] + tokens).index(after[0]) - len(before)
    assert before == ([-1] + tokens)[first:first + len(before)]  # what stands before it
  if len(made) > 1:
    assert all(sum(map(len, pair)) == context + 1 for pair in made)


def test_loglikelihoods_of_texts_are_those_of_the_forward_pass(answerer, decoder):
  logprobs = teacher_of(decoder)
  ids = [BYTES.document_start_id, *b"The state"]
  logprob_SV = logprobs(ids)
  want = logprob_SV[np.arange(len(ids) - 1), ids[1:]].sum()
  long = "of the union " * 20
  found = answerer.loglikelihood_rolling(["The state", long, ""])
  assert found[0] == pytest.approx(want, abs=1e-4)
  assert found[2] == 0
  tokens = list(long.encode())
  want = 0.0
  for at in range(len(tokens)):
    if at < CONTEXT:
      before = [256, *tokens[:at]]
    else:  # each window takes as many new tokens as fit; the last reaches back
      end = min((at // CONTEXT + 1) * CONTEXT, len(tokens))
      before = tokens[end - CONTEXT - 1:at]
    want += logprobs(before)[-1, tokens[at]]
  assert found[1] == pytest.approx(want, abs=1e-3)
  (score,) = answerer.loglikelihood([("The ", "state")])
  at = np.arange(len("The"), len("The state"))
  assert score.loglikelihood == pytest.approx(logprob_SV[at, [*b" state"]].sum(), abs=1e-4)


def test_generation_is_greedy_and_ends_before_its_stops(answerer, decoder):
  prompt = "The state"
  (row,) = decoder.generate([[256, *prompt.encode()]], 40, end=256)
  whole = BYTES.decode(row)
  stop = whole[10:12]
  found = answerer.generate_until([
      (prompt, {"until": [], "max_gen_toks": 40}),
      ("another", {"until": ["\n\n"], "max_gen_toks": 40}),
      (prompt, {"until": [stop, "never there"], "max_gen_toks": 40, "do_sample": False,
                "temperature": 0.7}),
      (prompt, {"until": stop, "max_new_tokens": 40})])
  assert found[0] == whole and len(found[1].encode()) >= 1
  assert found[2] == found[3] == whole[:whole.index(stop)]


def test_a_prompt_longer_than_the_context_keeps_its_end(answerer, decoder):
  prompt = "of the union " * 30
  kept = CONTEXT - 20
  (row,) = decoder.generate([list(prompt.encode())[-kept:]], 20, end=256)
  assert answerer.generate_until([(prompt, {"max_gen_toks": 20})]) == [BYTES.decode(row)]


def test_decoding_stops_when_all_rows_have_ended(decoder, monkeypatch):
  steps = []
  decode = decoder.decode
  monkeypatch.setattr(decoder, "decode", lambda *args: steps.append(1) or decode(*args))
  asked = []
  decoder.generate([[256, 65]], 60,
                   ended=lambda tokens: asked.append(len(tokens)) or len(tokens) >= 30)
  assert len(steps) == 31 and asked == [16, 32]


def test_settings_of_generation():
  parsed = parse_generation({"until": "\n", "max_gen_toks": 5, "do_sample": True, "top_k": 4,
                             "temperature": 0.5, "seed": 3}, 64)
  assert parsed == requests.Generation(5, ("\n",), Sampling(0.5, 4, 1.0, 3))
  assert parse_generation({}, 1024) == requests.Generation(256, (), Sampling())
  assert parse_generation({"do_sample": True}, 1024).sampling.temperature == 1
  assert cut("abc. def", ["f", ". "]) == "abc" and cut("abc", ["x"]) == "abc"


@pytest.mark.parametrize("bad, message", [
    ({"max_gen_toks": 64}, "max_gen_toks=64'.*must be 1 to 63.*data.seq_len=64"),
    ({}, "max_gen_toks=256'"), ({"max_gen_toks": "many"}, "max_gen_toks='many'.*a number"),
    ({"num_beams": 4}, "generation_kwargs.num_beams'.*is not supported"),
    ({"max_gen_toks": 4, "top_p": 3}, "top_p=3")])
def test_settings_that_cannot_be_followed_are_one_line(bad, message):
  with pytest.raises(FieldError, match=message) as error:
    parse_generation(bad, 64)
  assert error.value.field == "tasks" and "\n" not in str(error.value)
