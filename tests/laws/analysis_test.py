"""One analysis: its parts agree with each other, and warn where they must."""

import numpy as np
import pytest

from moe_jax.errors import FieldError
from moe_jax.laws import claims
from moe_jax.laws.analysis import analyse
from moe_jax.laws.cells import Cells
from moe_jax.laws.fit import fit
from moe_jax.laws.forms import form_for
from moe_jax.laws.power import Margin
from moe_jax.laws.publish.sections import lead_of
from moe_jax.laws.reduce import to_cells
from moe_jax.laws.report import quality_lines, report
from tests.laws.results_file import rows_of


@pytest.fixture(scope="module")
def shared():
  """Two cells an architecture, and the form with curvature."""
  cells = to_cells(rows_of(n_cells=16, tokens=(1e9, 4e9), learning_rates=1))
  return analyse(cells, "paper-curved", draws=99)


def test_the_claims_quote_the_intervals_of_the_form_that_was_asked_for(shared):
  for claim in shared.claims:
    assert claim.interval == shared.headline[claim.parameter]
  assert "at the grid's mean ln s" in shared.claims[0].sentence


def test_cells_that_share_an_architecture_are_warned_about(shared):
  text = "\n".join(report(shared))
  assert "the profile likelihood treats them as independent" in text
  assert "the F-tests below treat cells as independent" in text
  alone = "\n".join(report(analyse(to_cells(rows_of(n_cells=24, learning_rates=1)), "paper",
                                   draws=99)))
  assert "as independent" not in alone


def test_rivals_are_held_against_cells_without_one_n_exp(shared):
  paper = next(rival for rival in shared.rivals if rival.law == "paper")
  assert np.isfinite(paper.n_exp_rmse) and paper.n_exp_rmse >= paper.rmse
  assert f"{100 * paper.n_exp_rmse:.3g} % without one n_exp" in "\n".join(report(shared))


def test_the_same_input_gives_the_same_report(shared):
  again = analyse(shared.cells, "paper-curved", draws=99)
  assert report(again) == report(shared)


@pytest.mark.parametrize("margin", [(0.0,), (-1.0,), (np.nan,), (np.inf,), (0.25, 1.0),
                                    (0.25, np.inf), (0.25, np.nan)])
def test_a_margin_that_is_none(margin):
  with pytest.raises(FieldError, match="must be a finite number above 1|must be above 0 and"):
    Margin(*margin)


def test_the_margin_is_told_in_percent(shared):
  text = "\n".join(report(shared))
  assert "margin 0.25 % of the loss when a variable grows 8-fold" in text
  assert "margin ±0.0012 (0.25 % of the loss when" in text


@pytest.mark.parametrize("law", ["paper-active", "total-sparsity"])
def test_the_claims_are_of_a_form_that_holds_what_they_say(law):
  """With ln n_active beside them the slopes are not those at equal n_total and sparsity."""
  cells = to_cells(rows_of(n_cells=24, learning_rates=1))
  found = analyse(cells, law, draws=99)
  assert found.claims_law == "paper-curved"
  assert found.claims == claims.assess(cells, law="paper-curved", draws=99)
  assert "claims of arXiv 2601.08215 by paper-curved" in "\n".join(report(found))
  (said,) = [line for line in lead_of(found) if "tests both claims" in line]
  theirs, asked = form_for("paper-curved", cells).formula, form_for(law, cells).formula
  assert f"with the law {theirs}. Everything else in this report uses the law {asked}." in said


def test_residuals_of_nothing_but_seeds_are_as_large_as_their_noise():
  """A few cells and many coefficients: the rmse itself would be far below the noise."""
  ratios, n = [], 8
  for seed in range(60):
    rng = np.random.default_rng(seed)
    loss = np.exp(1 + 0.002 * rng.standard_normal(n))
    fitted = fit(Cells.of(loss, loss_se=0.002 * loss, n_total=[1e6, 1e8] * 4,
                          n_exp=[8, 16, 16, 32, 32, 64, 64, 128],
                          n_topk=[1, 1, 2, 4, 8, 2, 4, 16]), "paper")
    (line,) = [line for line in quality_lines(fitted) if "times the noise" in line]
    ratios.append(float(line.split()[2])**2)
  assert np.mean(ratios) == pytest.approx(1, abs=0.25)
