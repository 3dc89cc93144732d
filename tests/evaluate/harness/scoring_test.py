"""Scores are those of the teacher-forced forward pass, compiled for few shapes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.errors import FieldError
from moe_jax.evaluate.harness import scoring
from moe_jax.evaluate.harness.scoring import Scorer
from tests.evaluate.decode_test import count_compiles
from tests.evaluate.harness.models import CONTEXT, decoder_of, teacher_of
from tests.small import MESHES

ALL_LENGTHS = [(size, 1) for size in range(1, CONTEXT + 1)]


@pytest.fixture(scope="module")
def fresh():
  """A scorer that has scored a row of every length, and how often that compiled."""
  scorer = Scorer(decoder_of())
  with count_compiles() as compiled:
    scorer.score(random_pairs(ALL_LENGTHS))
  return scorer, len(compiled)


@pytest.fixture(scope="module")
def pair(fresh):
  return fresh[0], teacher_of(decoder_of())


def random_pairs(sizes, seed=0):
  rng = np.random.default_rng(seed)
  return [(rng.integers(0, 256, before).tolist(), rng.integers(0, 256, after).tolist())
          for before, after in sizes]


SIZES = [(1, 1), (3, 9), (20, 4), (1, 40), (70, 2), (2, 120), (CONTEXT, 1), (90, 80), (500, 30)]


def expected(logprobs, before, after):
  row = [*before, *after][-(CONTEXT + 1):]
  at = np.arange(len(row) - 1 - len(after), len(row) - 1)
  logprob_SV = logprobs(row[:-1])
  return (logprob_SV[at, after].sum(dtype=np.float64),
          bool((logprob_SV[at].argmax(-1) == after).all()))


def test_scores_are_those_of_the_forward_pass_whatever_the_batch(pair):
  """Also of a pair that is longer than the context: it loses its beginning."""
  scorer, logprobs = pair
  pairs = random_pairs(SIZES)
  together = scorer.score(pairs)
  for (before, after), score in zip(pairs, together, strict=True):
    value, greedy = expected(logprobs, before, after)
    assert score.loglikelihood == pytest.approx(value, abs=1e-4)
    assert score.greedy == greedy
  alone = [scorer.score([each])[0] for each in pairs[:3]]
  np.testing.assert_allclose([score.loglikelihood for score in alone],
                             [score.loglikelihood for score in together[:3]], atol=1e-5)


def test_what_is_greedy_is_said_to_be_greedy(pair):
  scorer, logprobs = pair
  before, after = [256, 65, 66], []
  for _ in range(5):
    after.append(int(logprobs([*before, *after])[-1].argmax()))
  wrong = [*after[:2], (after[2] + 1) % 256, *after[3:]]
  first, second, third = scorer.score([(before, after), (before, wrong), (before, after[:2])])
  assert (first.greedy, second.greedy, third.greedy) == (True, False, True)
  assert first.loglikelihood < third.loglikelihood < 0


def test_all_lengths_are_four_shapes(fresh):
  """Rows of every length compile at most four programs, and in another order none."""
  scorer, compilations = fresh
  assert 1 <= compilations <= 4
  order = np.random.default_rng(1).permutation(CONTEXT)
  with count_compiles() as compiled:
    scorer.score(random_pairs([ALL_LENGTHS[at] for at in order], seed=2))
  assert not compiled


def test_a_mesh_scores_the_same(pair):
  scorer, _ = pair
  other = Scorer(decoder_of(MESHES["data2_fsdp2_expert2"], 8))
  pairs = random_pairs(SIZES[:2])
  for one, two in zip(scorer.score(pairs), other.score(pairs), strict=True):
    assert one.loglikelihood == pytest.approx(two.loglikelihood, abs=1e-5)
    assert one.greedy == two.greedy


@pytest.mark.parametrize("bad, message", [
    (([], [1]), "gives an empty context"), (([1], []), "must have 1 to 128"),
    (([1], [1] * 129), "a continuation of 129 tokens'.*data.seq_len=128")])
def test_what_cannot_be_scored_is_one_line(pair, bad, message):
  with pytest.raises(FieldError, match=message) as error:
    pair[0].score([bad])
  assert "\n" not in str(error.value)
  assert len(pair[0].score([([1], [1] * 128)])) == 1


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(1, 200), max_size=40), context=st.integers(2, 200),
       n_devices=st.sampled_from([1, 2, 6, 8]), tokens=st.integers(1, 2000))
def test_every_row_is_in_one_batch_that_holds_it(sizes, context, n_devices, tokens):
  sizes = [min(size, context) for size in sizes]
  made = scoring.batches(sizes, context, tokens, n_devices)
  assert sorted(number for chosen, _, _ in made for number in chosen) == list(range(len(sizes)))
  shapes = {}
  for chosen, batch, length in made:
    assert 0 < len(chosen) <= batch and batch % n_devices == 0 and length <= context
    assert batch == n_devices or batch * length <= tokens
    assert all(sizes[number] <= length for number in chosen)
    assert shapes.setdefault(length, batch) == batch
  assert len(shapes) <= 4
