"""The claims, on grids where the truth is known: shown, opposite, none, undecided, refused."""

import dataclasses

import numpy as np
import pytest

from moe_jax.errors import FieldError
from moe_jax.laws import claims
from moe_jax.laws.analysis import analyse
from moe_jax.laws.cells import Cells
from moe_jax.laws.power import MARGIN, Margin
from moe_jax.laws.reduce import to_cells
from tests.experiment_files import ROOT
from tests.laws.identify_test import fixed_active
from tests.laws.results_file import rows_of

STUDY = ROOT / "experiments" / "study"


def grid(c=0.02, b_minus_c=0.01, noise=0.001, seed=0, n=40, heads=None, granularity=None):
  """Cells with exact counts (no routers) and a planted log-log law."""
  rng = np.random.default_rng(seed)
  n_exp, n_topk = 2.0**rng.integers(3, 8, n), 2.0**rng.integers(0, 3, n)
  g = np.full(n, 4.0) if granularity is None else granularity(n_exp, rng)
  attention = np.full(n, 4.0) if heads is None else heads(rng, n)
  n_layers, d_model = rng.integers(4, 12, n), 64.0 * rng.integers(2, 9, n)
  core = n_layers * d_model**2
  router = n_layers * d_model * n_exp
  n_total = core * (attention + 3 * n_exp / g) + router
  n_active = core * (attention + 3 * n_topk / g) + router
  log_loss = (3 - 0.09 * np.log(n_total) + b_minus_c * np.log(n_exp)
              + c * np.log(n_exp / n_topk) + noise * rng.standard_normal(n))
  return Cells.of(np.exp(log_loss), n_layers=n_layers, d_model=d_model, d_expert=d_model / g,
                  n_exp=n_exp, n_topk=n_topk, n_total=n_total, n_active=n_active)


def verdicts(cells, margin=MARGIN):
  return {claim.parameter: claim for claim in claims.assess(cells, margin)}


def test_shown():
  found = verdicts(grid())
  for parameter, truth in (("c", 0.02), ("b_minus_c", 0.01)):
    claim = found[parameter]
    assert claim.verdict == claims.SHOWN and claim.interval.covers(truth)
    assert "These data show it" in claim.sentence and "%" in claim.sentence


def test_the_opposite_is_shown():
  assert verdicts(grid(b_minus_c=-0.01))["b_minus_c"].verdict == claims.OPPOSITE


def test_none_within_the_margin():
  claim = verdicts(grid(b_minus_c=0.0, noise=3e-4, seed=3))["b_minus_c"]
  assert claim.verdict == claims.EQUIVALENT
  margin = claim.margin.slope
  assert -margin < claim.equivalence.low < claim.equivalence.high < margin
  assert "no effect beyond the margin" in claim.sentence


def test_the_margin_is_that_of_the_studys_plan():
  assert MARGIN.slope == pytest.approx(np.log(1.0025) / np.log(8))
  plan = " ".join((STUDY / "README.md").read_text().split())
  assert f"margin: {MARGIN.percent:g} % of the loss over an eightfold n_exp" in plan
  # Of 0.15 % a unit of ln is 0.31 % over eightfold: no longer none.
  cells = grid(b_minus_c=0.0015, noise=1e-4)
  assert verdicts(cells)["b_minus_c"].verdict == claims.SHOWN
  assert "smaller than the margin" not in verdicts(cells)["b_minus_c"].sentence
  assert "margin of 0.4 % of the loss when a variable grows 8-fold" in verdicts(
      cells, Margin(0.4))["b_minus_c"].sentence


def test_undecided_is_not_none():
  claim = verdicts(grid(b_minus_c=0.0, noise=0.03))["b_minus_c"]
  assert claim.verdict == claims.UNDECIDED
  assert "does not mean that there is no effect" in claim.sentence


def test_shown_but_below_the_margin():
  claim = verdicts(grid(c=0.02), Margin(20.0, 8.0))["c"]
  assert claim.verdict == claims.SHOWN and "smaller than the margin" in claim.sentence


def test_refused_with_what_is_identified():
  claim = verdicts(fixed_active())["b_minus_c"]
  assert claim.verdict == claims.REFUSED and claim.interval is None
  assert "collinear" in claim.sentence and "Identified instead: b_minus_c -0.9" in claim.sentence


def test_equivalence_intervals_are_narrower_than_the_two_sided_ones():
  for claim in claims.assess(grid()):
    assert claim.interval.low < claim.equivalence.low < claim.equivalence.high
    assert claim.equivalence.high < claim.interval.high


def test_a_plain_grid_breaks_no_tie():
  found = claims.mechanism(grid())
  assert not found.core_or_active and not found.experts_or_core and not found.estimates
  assert "Attention has 4 to 4 d²" in found.sentences[0]
  assert all("confounded in these data" in sentence for sentence in found.sentences)


def test_a_planted_grid_breaks_no_tie_either():
  found = claims.mechanism(to_cells(rows_of()))
  assert not found.core_or_active and not found.experts_or_core


def test_granularity_varied_apart_from_n_exp_tells_experts_from_core():
  cells = grid(granularity=lambda n_exp, rng: 2.0**rng.integers(0, 4, len(n_exp)))
  found = claims.mechanism(cells)
  assert found.experts_or_core and not found.core_or_active
  # The planted law has n_exp and no core of its own.
  assert found.estimates["experts-or-core: more_experts"].covers(0.01)
  assert found.estimates["experts-or-core: core"].covers(0.0)


def test_granularity_that_follows_n_exp_does_not():
  cells = grid(granularity=lambda n_exp, rng: n_exp / 4)
  assert not claims.mechanism(cells).experts_or_core


def test_another_attention_share_tells_core_from_active():
  found = claims.mechanism(grid(heads=lambda rng, n: rng.choice([2.5, 4.0], n)))
  assert found.core_or_active
  assert {"core-or-active: core", "core-or-active: active"} <= set(found.estimates)


def test_the_mechanism_needs_the_shapes():
  with pytest.raises(FieldError, match="n_active"):
    claims.mechanism(Cells.of([3.0, 2.0], n_total=[1e6, 2e6]))


def test_shared_experts_that_vary_are_not_taken_for_attention():
  cells = grid(heads=lambda rng, n: 2.0 + 2.0 * rng.integers(0, 2, n))
  assert claims.mechanism(cells).core_or_active
  runs = tuple(({"n_shared_experts": str(i % 2), "n_dense_layers": "0"},)
               for i in range(len(cells)))
  found = claims.mechanism(dataclasses.replace(cells, runs=runs))
  assert not found.core_or_active and "Cells differ in n_shared_experts, so" in found.sentences[0]
  assert not any(name.startswith("core-or-active") for name in found.estimates)


def test_a_form_that_cannot_be_fitted_refuses_its_claims_alone():
  few = grid(n=5)
  found = analyse(few, "total-sparsity", draws=99)
  assert [claim.verdict for claim in found.claims] == [claims.REFUSED] * 2
  assert all("too few for paper-curved" in claim.sentence for claim in found.claims)
