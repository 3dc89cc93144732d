import itertools
import re

import numpy as np
import pytest

from benchmarks.design_search import scalar
from moe_jax.arch import Architecture
from moe_jax.design.ask import Question, judges, resolved
from moe_jax.design.budget import budgets
from moe_jax.design.inference import Serving, parse_slice
from moe_jax.design.search import search
from moe_jax.design.space import VARIABLES
from moe_jax.errors import FieldError
from tests.design.space_test import SMALL

SERVING = Serving(batch=4, context=256, slice=parse_slice("v5e-2"))
BUDGETS = dict(memory_gb=0.1, decode_ms=0.04)
QUESTION = Question(SMALL, SERVING, tokens=1e9, law="abnar", **BUDGETS)


def found_for(question, extra=()):
  question = resolved(question)
  limits = budgets(question.serving, question.memory_gb, question.active_params,
                   question.decode_ms, question.prefill_ms)
  return search(question.space, limits, judges(question), extra)


def test_it_finds_what_a_plain_loop_over_all_architectures_finds():
  found = found_for(QUESTION)
  expected = {}
  for n_exp, topks in SMALL.routings().items():
    for n_topk, three in itertools.product(topks, zip(*SMALL.shapes(), strict=True)):
      l, d, f = map(int, three)  # noqa: E741
      if d > 390:  # by far too dear, and many
        continue
      heads = max(1, round(d / 128))
      arch = Architecture(n_layers=l, d_model=d, d_expert=f, n_exp=n_exp, n_topk=n_topk,
                          n_heads=heads, head_dim=128, vocab_size=50304)
      costs, scores = scalar(arch, QUESTION, ["abnar"])
      if all(c <= 1.1 * most for c, most in zip(costs, BUDGETS.values(), strict=True)):
        expected[l, d, f, n_exp, n_topk] = costs + scores
  assert len(expected) > 300
  ours = {tuple(map(int, five)): [*found.costs[:, i], *found.scores[:, i]]
          for i, five in enumerate(found.variables.T)}
  assert set(ours) == set(expected)
  np.testing.assert_allclose(list(ours.values()), [expected[five] for five in ours], rtol=1e-11)
  within = found.within()
  assert 0 < within.sum() < len(found)
  np.testing.assert_array_equal(within, (found.costs <= [[0.1], [0.04]]).all(axis=0))
  assert found.lattice == len(SMALL.shapes()[0]) * 17 and found.priced < found.lattice


def test_a_widened_budget_is_widened_alone():
  found = found_for(QUESTION)
  within, wider = found.within(), found.within("memory_gb")
  assert np.all(wider[within]) and wider.sum() > within.sum()
  assert np.all(found.costs[1, wider] <= 0.04) and np.all(found.costs[0, wider] <= 0.11)


def test_a_given_architecture_is_judged_whatever_it_costs():
  arch = SMALL.architecture(40, 1920, 960, 8, 2)
  found = found_for(QUESTION, (arch,))
  assert found.n_extra == 1 and found.architecture(len(found) - 1) == arch
  assert found.costs[0, -1] > 0.1 and not found.within()[-1]


@pytest.mark.parametrize("given, line", [
    (dict(memory_gb=0.01, active_params=1e8), "memory_gb=0.01: too small; the smallest that"),
    (dict(memory_gb=1, active_params=1e4), "active_params=10000.0: too small; the smallest that"),
    (dict(memory_gb=1, decode_ms=1e-4), "decode_ms=0.0001: too small; the smallest that"),
    (dict(memory_gb=0.01, active_params=1e4), "memory_gb=0.01: too small, as are other"),
    (dict(memory_gb=0.01, prefill_ms=1e-4), "memory_gb=0.01: too small, as are other"),
])
def test_an_impossible_budget_says_the_smallest_that_works(given, line):
  def ask(**changed):
    return found_for(Question(SMALL, SERVING, tokens=1e9, law="abnar", **given | changed))

  with pytest.raises(FieldError) as error:
    ask()
  message = str(error.value)
  assert message.startswith(line) and "\n" not in message
  named = {name: float(value) for name, value in re.findall(r"--(\w+)=([\d.e+-]+)", message)}
  assert ask(**named).within().any()  # what it names works, and a little less does not
  for field, value in named.items():
    with pytest.raises(FieldError):
      ask(**named | {field: 0.995 * value})


def test_variables_are_those_of_an_architecture():
  assert set(VARIABLES) <= set(vars(SMALL.template))
