import dataclasses

import pytest

from moe_jax.design.ask import Question, judges, resolved
from moe_jax.design.inference import Serving, decode_ms, parse_slice
from moe_jax.design.published import PUBLISHED
from moe_jax.design.space import Space
from moe_jax.errors import FieldError
from moe_jax.laws.shape import Shape

OLMOE = PUBLISHED["OLMoE-1B-7B"]
V5E_8 = Serving(slice=parse_slice("v5e-8"))
LIKE = Question(Space(template=OLMOE.arch), like=OLMOE)


def test_chips_give_the_memory():
  question = resolved(Question(serving=V5E_8, decode_ms=5, tokens=1e12))
  assert question.memory_gb == pytest.approx(0.9 * 8 * 16 * 2**30 / 1e9)


def test_what_is_given_goes_before_what_a_model_has():
  question = resolved(dataclasses.replace(LIKE, memory_gb=10, active_params=5e8, tokens=1e12))
  assert (question.memory_gb, question.active_params, question.tokens) == (10, 5e8, 1e12)


def test_a_model_on_chips_gives_its_decode_time():
  question = resolved(dataclasses.replace(LIKE, serving=V5E_8))
  assert question.active_params is None
  assert question.decode_ms == pytest.approx(float(decode_ms(Shape.of(OLMOE.arch), V5E_8)))


def test_which_laws_are_asked():
  base = Question(memory_gb=16, active_params=2e8, tokens=9e9)
  assert len(judges(base)) == 7
  assert [j.name for j in judges(dataclasses.replace(base, law="besiroglu"))] == ["besiroglu"]


@pytest.mark.parametrize("given, line", [
    (dict(active_params=1e8), "memory_gb=None: is missing"),
    (dict(memory_gb=16), "active_params=None: is missing: give an inference budget"),
    (dict(memory_gb=16, decode_ms=5), "decode_ms=5: needs --hardware"),
    (dict(memory_gb=16, prefill_ms=5), "prefill_ms=5: needs --hardware"),
    (dict(memory_gb=500, decode_ms=5, serving=V5E_8), "memory_gb=500: is more than v5e-8 has"),
    (dict(memory_gb=16, active_params=1e8, law="clark", tokens=1e9),
     "law='clark': has no variable for tokens; it depends on n_active, sparsity"),
    (dict(memory_gb=16, active_params=1e8, law="zhao"), "tokens=None: is missing: zhao needs"),
    (dict(memory_gb=16, active_params=1e8, law="ling"), "flops=None: is missing: ling needs"),
    (dict(memory_gb=16, active_params=1e8), "tokens=None: is missing"),
    (dict(memory_gb=16, active_params=1e8, tokens=1e9, law="paper"),
     "law='paper': is a form without published coefficients"),
    (dict(memory_gb=16, active_params=1e8, tokens=1e9, law="zhoa"),
     "law='zhoa': did you mean 'zhao'"),
    (dict(memory_gb=-1, active_params=1e8), "memory_gb=-1: must be above 0"),
    (dict(memory_gb=1, active_params=1e8, tolerance=2.0), "tolerance=2.0: must lie between"),
])
def test_bad_questions(given, line):
  with pytest.raises(FieldError) as error:
    judges(resolved(Question(**given)))
  assert str(error.value).startswith(line) and "\n" not in str(error.value)
