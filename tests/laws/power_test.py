"""The power that is stated is the power that the project's own fit and test have."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from moe_jax.errors import FieldError
from moe_jax.laws import claims, power
from moe_jax.laws.cells import Cells
from moe_jax.laws.forms import form_for
from moe_jax.laws.information import Noise, design_of
from tests.laws.information_test import drawn, grid


def power_at(design, noise, parameter="b_minus_c", margin=0.002):
  return next(p for p in power.power_of(design, noise, margin) if p.parameter == parameter)


@pytest.mark.parametrize("df", [3, 10, 40])
def test_detection_is_the_noncentral_t(df):
  effect = power.detectable(df)
  t = power.t_quantile(df)
  exact = stats.nct.sf(t, df, effect) + stats.nct.cdf(-t, df, effect)
  assert exact == pytest.approx(0.8, abs=1e-3)
  assert power.detection_power(effect, df) == pytest.approx(0.8, abs=1e-6)
  assert power.detection_power(0, df) == pytest.approx(0.05, abs=1e-3)


@pytest.mark.parametrize("df", [1, 2, 8, 500])
def test_equivalence_by_simulation(df):
  margin = power.equivalence_margin(df)
  rng = np.random.default_rng(0)
  estimate, error = rng.standard_normal(200_000), np.sqrt(rng.chisquare(df, 200_000) / df)
  for effect, tolerance in ((0, 0.005), (1, 0.005)):
    shown = np.abs(estimate + effect) + power.t_quantile(df, 0.9) * error < margin
    assert power.equivalence_power(margin, df, effect) == pytest.approx(shown.mean(),
                                                                        abs=tolerance)
  assert power.equivalence_power(margin, df) == pytest.approx(0.8, abs=1e-6)
  assert power.equivalence_power(margin, df, effect=margin) < 0.055


@settings(max_examples=25, deadline=None)
@given(st.integers(6, 11), st.floats(0, 0.005), st.sampled_from(["b_minus_c", "c", "a"]))
def test_power_grows_with_cells(n, architecture, parameter):
  """Whichever cells of equal noise are added."""
  noise = Noise(0.002, architecture)
  found = []
  order = np.random.default_rng(n).permutation(12)
  for cells in (grid().take(np.sort(order[:n])), grid().take(np.sort(order[:n + 1])), grid()):
    design = design_of(form_for("paper", cells), cells)
    if np.linalg.matrix_rank(design.x_NP) < 4 or len(cells) < 6:
      return
    found.append(power_at(design, noise, parameter))
  for less, more in zip(found, found[1:], strict=False):
    assert more.detectable <= less.detectable * (1 + 1e-9)
    assert more.margin <= less.margin * (1 + 1e-9)
    # Below that a test of few degrees of freedom succeeds by luck with its own error alone.
    assert less.at_margin < 0.1 or more.at_margin >= less.at_margin


def test_percent_over_a_fold():
  assert power.percent_over(power.slope_of(0.25, 8), 8) == pytest.approx(0.25)
  assert power.percent_over(0.01, 8) == pytest.approx(100 * (8**0.01 - 1))


def test_bad_margin():
  design = design_of(form_for("paper", grid()), grid())
  with pytest.raises(FieldError, match="margin"):
    power.power_of(design, Noise(0.002, 0), 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("tokens,seeds,least", [((1e9,), 1, 0.74), ((1e9, 4e9), 2, 0.65)])
def test_a_planted_effect_is_found_as_often_as_stated(tokens, seeds, least):
  """By claims.assess, on 200 grids each: the least detectable effect, and none at all."""
  plan = grid(seeds, tokens)
  noise = Noise(0.003, 0.002)
  form = form_for("paper", plan)
  design = design_of(form, plan)
  stated = power_at(design, noise)
  margin = power.Margin(power.percent_over(stated.margin, 8), 8)
  truth = dict.fromkeys(form.parameters, 0.05) | {"c0": 3.0}
  verdicts = {}
  for effect in (stated.detectable, 0.0):
    theta = np.array([truth[p] if p != "b_minus_c" else effect for p in form.parameters])
    errors = drawn(plan, noise, np.random.default_rng(1), 200)
    verdicts[effect] = [
        next(claim.verdict for claim in claims.assess(_with(plan, design.x_NP @ theta + error),
                                                      margin)
             if claim.parameter == "b_minus_c") for error in errors]
  found = np.mean([v == claims.SHOWN for v in verdicts[stated.detectable]])
  false = np.mean([v in (claims.SHOWN, claims.OPPOSITE) for v in verdicts[0.0]])
  absent = np.mean([v == claims.EQUIVALENT for v in verdicts[0.0]])
  print(f"found {found:.3f}, falsely {false:.3f}, absent {absent:.3f}")
  assert least <= found <= 0.86
  assert 0.02 <= false <= 0.09
  assert least - 0.06 <= absent <= 0.86


def _with(cells, log_loss):
  return Cells.of(np.exp(log_loss), architecture=cells.architecture, seeds=cells.seeds,
                  **cells.columns)
