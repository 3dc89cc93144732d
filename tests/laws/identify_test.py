"""What the data cannot tell apart is named and refused; what they can is kept."""

import numpy as np
import pytest

from moe_jax.errors import FieldError
from moe_jax.laws.cells import Cells
from moe_jax.laws.fit import fit
from moe_jax.laws.forms import FORMS, form_for
from moe_jax.laws.identify import identify
from moe_jax.laws.reduce import to_cells
from tests.laws.results_file import rows_of

N_EXP = np.array([8.0, 16, 32, 64, 128])


def fixed_active():
  """n_exp varied at a fixed core and n_topk: the size grows with it."""
  n_total = 1e5 * (4 + 3 * N_EXP)
  loss = 3 * n_total**-0.1 * N_EXP**0.01
  return Cells.of(loss, n_total=n_total, n_exp=N_EXP, n_topk=np.full(5, 2))


def test_a_good_grid_is_identified():
  cells = to_cells(rows_of())
  for law in ("paper", "paper-curved", "total-active", "total-sparsity"):
    found = identify(form_for(law, cells), cells)
    assert not found.refused and found.form is found.asked
    assert "every coefficient is identified" in found.lines()[-1]


def test_collinear_coefficients_are_refused_and_their_combination_given():
  fitted = fit(fixed_active(), "paper")
  assert set(fitted.identified.refused) == {"a", "b_minus_c", "c"}
  assert fitted.parameters == ("c0", "slope_n_exp")
  cells = fixed_active()
  slope = np.polyfit(cells.log("n_exp"), cells.log_loss, 1)[0]
  assert fitted.value("slope_n_exp") == pytest.approx(slope)
  combination = fitted.identified.combinations["slope_n_exp"]
  assert combination.startswith("b_minus_c -0.9") and "+1.000 c" in combination
  with pytest.raises(FieldError, match="collinear"):
    fitted.value("a")


def test_the_combination_is_what_it_says():
  """Of planted coefficients, the reported slope is the reported combination."""
  cells = fixed_active()
  fitted = fit(cells, "paper")
  share = np.polyfit(cells.log("n_exp"), cells.log("n_total"), 1)[0]
  assert fitted.value("slope_n_exp") == pytest.approx(0.01 - 0.1 * share)


def test_a_variable_that_hardly_varies_is_held():
  wobble = 1 + 0.004 * np.array([1, -1, 0, 1, -1, 0, 1, -1])
  n_exp = np.array([8, 16, 32, 64, 8, 16, 32, 64.0])
  n_topk = np.array([1, 1, 2, 2, 4, 4, 1, 8.0])
  cells = Cells.of(3 * (n_exp / n_topk)**0.02, n_total=1e8 * wobble, n_exp=n_exp,
                   n_topk=n_topk)
  fitted = fit(cells, "paper")
  assert "hardly varies" in fitted.identified.refused["a"]
  assert fitted.value("c") == pytest.approx(0.02, abs=1e-6)


def test_fixed_tokens_make_the_tokens_term_one_with_the_irreducible_loss():
  cells = to_cells(rows_of())
  found = identify(form_for("paper-tokens", cells), cells)
  assert set(found.refused) == {"beta", "ln_E"}
  assert "ln_B stands for their sum" in found.refused["ln_E"]
  assert len(found.form.terms) == 2


def test_fixed_granularity_merges_krajewskis_two_terms():
  cells = to_cells(rows_of(tokens=(1e9, 4e9, 1.6e10)))
  cells.columns["granularity"] = np.full(len(cells), 4.0)
  found = identify(form_for("krajewski", cells), cells)
  assert set(found.refused) == {"gamma", "ln_A"}


def test_tokens_join_a_log_log_form_only_where_they_vary():
  assert "d" not in form_for("paper", to_cells(rows_of())).parameters
  assert "d" in form_for("paper", to_cells(rows_of(tokens=(1e9, 4e9)))).parameters


def test_two_sparsities_show_no_curvature():
  cells = to_cells(rows_of())
  s = cells.columns["sparsity"]
  found = identify(form_for("paper-curved", cells.take((s == 8) | (s == 32))),
                   cells.take((s == 8) | (s == 32)))
  assert "q" in found.refused


def test_too_few_cells():
  cells = to_cells(rows_of())
  with pytest.raises(FieldError, match="too few for paper"):
    identify(form_for("paper", cells), cells.take(np.arange(4)))


def test_tokens_are_no_substitute_for_architectures():
  cells = to_cells(rows_of(learning_rates=1, n_cells=4, tokens=(1e9, 4e9, 1.6e10)))
  with pytest.raises(FieldError, match="'4 architectures': too few for paper"):
    identify(form_for("paper", cells), cells)


def test_a_law_that_asks_for_what_is_not_there():
  cells = Cells.of([3.0, 2.0, 1.0], n_total=[1e6, 2e6, 3e6])
  for law in set(FORMS):
    with pytest.raises(FieldError, match="needs the column"):
      form_for(law, cells)
  with pytest.raises(FieldError, match="did you mean 'paper"):
    form_for("papers", cells)
