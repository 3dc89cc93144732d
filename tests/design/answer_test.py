import dataclasses

import numpy as np
import pytest

from moe_jax.design.answer import TIE, front
from moe_jax.design.ask import Question, ask
from moe_jax.design.files import as_dict
from moe_jax.design.front import pareto_front
from moe_jax.design.published import PUBLISHED
from moe_jax.design.report import best_table, is_inside
from moe_jax.design.space import Space
from moe_jax.laws.fit import fit
from moe_jax.laws.reduce import to_cells
from tests.design.space_test import SMALL
from tests.laws.results_file import rows_of

QUESTION = Question(SMALL, memory_gb=0.4, active_params=3e7, tokens=1e10)


@pytest.fixture(scope="module")
def asked():
  return ask(QUESTION)[1]


@pytest.fixture(scope="module")
def found_fit():
  return fit(to_cells(rows_of(n_cells=30, learning_rates=1)), "paper")


def test_the_best_has_the_lowest_score_within_the_budgets(asked):
  within = np.flatnonzero(asked.found.within())
  for row, r in enumerate(asked.recommendations):
    scores = asked.found.scores[row, within]
    assert r.score == scores.min() and r.best in within
    assert asked.found.scores[row, r.best] <= r.score + TIE
    assert asked.regret(r.best, row) == pytest.approx(0, abs=TIE)
    assert all(asked.regret(int(i), row) >= 0 for i in within[:50])


def test_inside_what_is_not_on_record_is_not_said(asked):
  marks = {True: "", None: "?", False: "*"}
  inside = {r.judge.name: is_inside(asked, r, r.best) for r in asked.recommendations}
  assert inside["zhao"] is None and inside["ling"] is None and inside["krajewski"] is not None
  last = {row[0]: row[-1] for row in best_table(asked).rows}
  for row, r in enumerate(asked.recommendations):
    text = r.judge.text(asked.found.scores[row, r.best])
    assert last[r.judge.name] == text + marks[inside[r.judge.name]]
    assert as_dict(QUESTION, asked, 0.0)["laws"][row]["inside"] is inside[r.judge.name]


def test_ties_go_to_the_least_memory(asked):
  row = next(i for i, r in enumerate(asked.recommendations) if r.judge.name == "flame-moe")
  r, found = asked.recommendations[row], asked.found
  tied = found.within() & (found.scores[row] <= r.score + TIE)
  assert tied.sum() > 1 and found.costs[0, r.best] < found.costs[0, tied].min() * 1.01


def test_what_is_as_good_is_within_the_tolerance_and_nothing_else(asked):
  found = asked.found
  for row, r in enumerate(asked.recommendations):
    expected = np.flatnonzero(found.within() & (found.scores[row] - r.score <= 0.005))
    assert set(r.near) == set(expected) and r.best in r.near
    for cost, leanest in zip(found.costs, r.leanest, strict=True):
      assert cost[leanest] == cost[expected].min()


@pytest.mark.parametrize("field", ["memory_gb", "active_params"])
def test_a_price_is_the_difference_to_a_search_with_a_wider_budget(asked, field):
  _, wider = ask(dataclasses.replace(QUESTION, **{field: 1.1 * getattr(QUESTION, field)}))
  for one, other in zip(asked.recommendations, wider.recommendations, strict=True):
    assert one.prices[field] == pytest.approx(other.score - one.score, abs=1e-12)
    assert one.prices[field] <= 0
  assert any(r.prices[field] < -1e-4 for r in asked.recommendations)


def test_the_best_inside_a_domain_is_inside_and_the_best_of_those(asked):
  found, within = asked.found, np.flatnonzero(asked.found.within())
  seen = 0
  for row, r in enumerate(asked.recommendations):
    inside = within[r.judge.inside(found.shape(within))]
    assert (r.inside is None) == (len(inside) == 0)
    if len(inside):
      seen += 1
      assert r.inside in inside
      assert found.scores[row, r.inside] <= found.scores[row, inside].min() + TIE
  assert seen >= 3


def test_the_principle_is_its_three_steps_in_order(asked):
  found = asked.found
  within = np.flatnonzero(found.within())
  archs = [found.architecture(i) for i in within]
  n_total = found.shape(within).n_total
  large = [a for a, n in zip(archs, n_total, strict=True) if n >= 0.95 * n_total.max()]
  least_s = min(a.sparsity for a in large)
  n_exp = min(a.n_exp for a in large if a.sparsity == least_s)
  chosen = found.architecture(asked.principle)
  assert chosen in large and (chosen.sparsity, chosen.n_exp) == (least_s, n_exp)


def test_the_front_holds_what_nothing_dominates_but_by_a_hair(asked):
  found, within = asked.found, np.flatnonzero(asked.found.within())
  for row, r in enumerate(asked.recommendations):
    ours = front(found, row)
    assert len(ours) < 2000 and found.scores[row, ours].min() <= r.score + TIE
    exact = within[pareto_front(found.scores[row, within], *found.costs[:, within])]
    for i in exact:  # each point of the exact front is one of ours, to the hair
      near = ((found.scores[row, ours] <= found.scores[row, i] + TIE)
              & np.all(found.costs[:, ours] <= found.costs[:, [i]] * 1.0101, axis=0))
      assert near.any()


def test_under_the_papers_law_the_search_does_what_the_law_says(found_fit):
  """With c above 0 the search spends the budgets on size and on a small s."""
  space = Space(experts=(8, 128), topk=(1, 16), multiple=64)
  question, found = ask(Question(space, memory_gb=2, active_params=1e8, fit=found_fit))
  assert question.tokens == 9e9  # of the data
  r = found.recommendations[0]
  assert r.judge.name == "paper" and len(found.recommendations) == 8
  a, b_minus_c, c = (found_fit.value(name) for name in ("a", "b_minus_c", "c"))
  shapes, within = found.found.within_shapes, found.found.within()
  ln_loss = (-a * np.log(shapes.n_total) + b_minus_c * np.log(shapes.n_exp)
             + c * np.log(shapes.sparsity))
  np.testing.assert_allclose(ln_loss - ln_loss.min(),
                             found.found.scores[0, within] - r.score, atol=1e-10)
  assert r.prices["memory_gb"] == pytest.approx(-a * np.log(1.1), rel=0.7)
  agreed = found.agrees(0)
  ours, its = (found.found.architecture(i) for i in (r.best, found.principle))
  assert agreed == (ours.n_exp == its.n_exp and ours.sparsity == its.sparsity)


def test_a_model_is_priced_beside_the_best_of_its_own_budgets():
  model = PUBLISHED["OLMoE-1B-7B"]
  space = Space(template=model.arch, multiple=512)
  question, found = ask(Question(space, like=model))
  assert question.tokens == 5.1e12
  assert question.active_params == 1_075_910_656
  assert question.memory_gb == pytest.approx(13.838 + 0.537, abs=0.001)
  chosen = found.found.architecture(found.chosen)
  assert (chosen.d_expert, chosen.n_exp) == (1024, 64)
  assert found.found.within()[found.chosen]
  assert all(found.regret(found.chosen, row) >= 0 for row in range(7))
