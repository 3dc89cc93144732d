"""Counts of what routers chose, against loops, and what the information in them means."""

import collections
import math

import numpy as np
import pytest

from moe_jax.evaluate import routing_plots
from moe_jax.evaluate.routing import RoutingCounts, information_share
from moe_jax.model.observed import Choices

L, B, S, K, E, G, V = 2, 4, 6, 2, 5, 2, 7


def batch(seed=0):
  """Experts that are chosen at random, but some by preference for a domain or for tokens."""
  rng = np.random.default_rng(seed)
  token_BS, domain_BS = rng.integers(0, V, (B, S)), rng.integers(0, G, (B, S))
  liked_BSE = np.eye(E)[domain_BS] + np.eye(E)[token_BS % E]
  expert_LBSK = np.argsort(-rng.random((L, B, S, E)) - liked_BSE, axis=-1)[..., :K]
  choices = Choices(expert_LBSK.astype(np.int16), rng.random((L, B, S, K)) < 0.3,
                    rng.random((L, B, S)).astype(np.float32))
  return choices, token_BS, domain_BS, rng.random((B, S)) < 0.8


def counts_of(*batches, keep=False):
  counts = RoutingCounts(G, E, V, first_layer=1, keep=keep)
  for one in batches:
    counts.add(*one)
  return counts


def test_the_numbers_are_those_of_loops_over_two_batches():
  batches = [batch(0), batch(1)]
  found = counts_of(*batches).result(["a", "b"])
  assert found["layers"] == [1, 2] and found["domains"] == ["a", "b"]
  tokens_G, load_GE, entropy_G, dropped_G = np.zeros(G), np.zeros((G, E)), np.zeros(G), np.zeros(G)
  pair_EE = np.zeros((E, E))
  for choices, _, domain_BS, mask_BS in batches:
    for b, s in zip(*np.nonzero(mask_BS), strict=True):
      g, experts = domain_BS[b, s], choices.expert_LBSK[1, b, s]
      tokens_G[g] += 1
      entropy_G[g] += choices.entropy_LBS[1, b, s]
      dropped_G[g] += choices.dropped_LBSK[1, b, s].sum()
      for expert in experts:
        load_GE[g, expert] += 1
        pair_EE[expert, experts] += 1
  assert found["tokens"] == tokens_G.tolist()
  close = {"atol": 1e-5}
  np.testing.assert_allclose(found["load"][1], load_GE / load_GE.mean(1, keepdims=True), **close)
  np.testing.assert_allclose(found["entropy"][1], entropy_G / tokens_G, **close)
  np.testing.assert_allclose(found["drop_rate"][1], dropped_G / tokens_G / K, **close)
  np.testing.assert_allclose(found["coactivation"][1], pair_EE / np.diag(pair_EE)[:, None],
                             **close)
  for name, of_BS in (("domain_information", lambda one: one[2]),
                      ("token_information", lambda one: one[1])):
    for layer in range(L):
      pairs = [(of_BS(one)[b, s], expert) for one in batches
               for b, s in zip(*np.nonzero(one[3]), strict=True)
               for expert in one[0].expert_LBSK[layer, b, s]]
      share = share_by_hand(pairs)
      assert 0 < share < 1 and found[name][layer] == pytest.approx(share, abs=1e-6), name


def share_by_hand(pairs):
  """(H(A) + H(E) - H(A, E)) / H(E) of pairs (a, e), each entropy with half of how many values
  there are, less one, for each pair added (Miller and Madow)."""

  def entropy(values):
    counts = collections.Counter(values)
    shares = [count / len(values) for count in counts.values()]
    return -sum(p * math.log(p) for p in shares) + (len(counts) - 1) / (2 * len(values))

  a, e = zip(*pairs, strict=True)
  return (entropy(a) + entropy(e) - entropy(pairs)) / entropy(e)


def test_one_domain_tells_nothing_of_domains():
  assert counts_of(batch()).result(["a"])["domain_information"] is None


def test_information_is_none_to_all():
  assert information_share(np.eye(4) * 1000) == pytest.approx(1, abs=1e-3)
  assert information_share(np.full((4, 6), 50)) == 0
  assert information_share(np.array([[10, 0], [7, 0]])) == 0  # one expert: nothing to tell
  half = np.array([[50, 50, 0, 0], [0, 0, 50, 50]]) * 100
  assert information_share(half) == pytest.approx(0.5, abs=1e-3)


def test_rare_tokens_are_not_taken_for_specialists():
  """Ten draws for each of 500 tokens, without regard to the token: naively a tenth or more."""
  rng = np.random.default_rng(0)
  count_AE = rng.multinomial(10, np.full(8, 1 / 8), size=500)
  p_AE = count_AE / count_AE.sum()
  outer = p_AE.sum(1, keepdims=True) * p_AE.sum(0)
  naive = np.nansum(p_AE * np.log(np.where(p_AE > 0, p_AE / outer, 1))) / np.log(8)
  assert naive > 0.1 and information_share(count_AE) < naive / 2


def test_agreement_is_of_sets_and_not_of_their_order():
  choices, *rest = batch()
  turned = choices._replace(expert_LBSK=choices.expert_LBSK[..., ::-1])
  ours, theirs = counts_of((choices, *rest), keep=True), counts_of((turned, *rest), keep=True)
  assert ours.agreement(theirs) == [1, 1]
  other = choices._replace(expert_LBSK=(choices.expert_LBSK + 1) % E)
  assert max(counts_of((other, *rest), keep=True).agreement(ours)) < 1
  none = choices._replace(expert_LBSK=np.zeros_like(choices.expert_LBSK))
  only = choices._replace(expert_LBSK=np.ones_like(choices.expert_LBSK))
  assert counts_of((none, *rest), keep=True).agreement(
      counts_of((only, *rest), keep=True)) == [0, 0]


def test_company_by_chance_is_one_and_a_pair_stands_out():
  rng = np.random.default_rng(0)
  expert_TK = np.array([rng.choice(4, 2, replace=False) for _ in range(4000)])

  def lift(expert_TK):
    shape = (1, 1, 4000)
    counts = RoutingCounts(1, 4, 3)
    counts.add(Choices(expert_TK.reshape(*shape, 2), np.zeros((*shape, 2), bool), np.zeros(shape)),
               np.zeros((1, 4000), int), np.zeros((1, 4000), int), np.ones((1, 4000), bool))
    return routing_plots.lift(counts.result(["a"]))

  others = ~np.eye(4, dtype=bool)
  np.testing.assert_allclose(lift(expert_TK)[others], 1, atol=0.1)
  assert np.isnan(np.diagonal(lift(expert_TK))).all()
  expert_TK[:2000] = [0, 1]
  assert lift(expert_TK)[0, 1] > 1.2 > 0.7 > lift(expert_TK)[0, 2]


def test_pictures_and_the_table_take_one_cell_or_many():
  found = {f"cell{i}": counts_of(batch(i), keep=True).result(["a", "b"]) for i in range(4)}
  for figures in (found, {"cell0": found["cell0"]}):
    for draw in (routing_plots.load_figure, routing_plots.company_figure):
      assert draw(figures) is not None
  steps = {cell: [result | {"step": step, "agreement": [0.5, 1.0]} for step in (10, 20)]
           for cell, result in found.items()}
  assert len(routing_plots.training_figure(steps).axes) == 4
  table = routing_plots.table(found)
  assert len(table.rows) == 4 * L * G and table.rows[0][:3] == ("cell0", 1, "a")
