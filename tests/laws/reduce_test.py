"""Seeds are repeats; a sweep of learning rates gives its envelope, or is refused."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.errors import FieldError
from moe_jax.laws.reduce import to_cells
from tests.laws.results_file import rows_of


def swept(rates, losses, cell="x", n_exp=8.0, seeds=1):
  shape = dict(n_layers=2.0, d_model=64.0, d_expert=16.0, n_exp=n_exp, n_topk=2.0,
               n_total=1e5 * n_exp, n_active=1e5, tokens=1e9, cell=cell)
  return [shape | dict(learning_rate=r, loss=loss, seed_init=float(s), seed_data=0.0)
          for r, loss in zip(rates, losses, strict=True) for s in range(seeds)]


OTHER = swept([1e-3], [3.0], cell="other", n_exp=16.0)


@settings(max_examples=30, deadline=None)
@given(st.floats(-0.3, 0.3), st.floats(0.005, 0.2), st.floats(0.5, 8))
def test_the_vertex_of_a_parabola_is_found(offset, curvature, lowest):
  rates = 1e-3 * 2.0**np.arange(-2, 3)
  losses = lowest * np.exp(curvature * (np.log(rates / 1e-3) - offset)**2)
  cells = to_cells(swept(rates, losses) + OTHER)
  assert cells.loss[0] == pytest.approx(lowest, rel=1e-9)


@pytest.mark.parametrize("losses", [[3.0, 3.1, 3.2], [3.2, 3.1, 3.0], [3.0, 3.1]])
def test_a_best_rate_at_the_edge_is_refused(losses):
  rates = [1e-3, 2e-3, 4e-3][:len(losses)]
  cells = to_cells(swept(rates, losses) + OTHER)
  assert cells.names == ("other",)
  assert any("edge of the sweep: x" in note for note in cells.notes)


def test_all_refused():
  rows = swept([1e-3, 2e-3], [3.0, 3.1]) + swept([1e-3, 2e-3], [3.0, 3.1], "y", 16.0)
  with pytest.raises(FieldError, match="best learning rate of every cell is at the edge"):
    to_cells(rows)


def test_seeds_are_averaged_and_give_the_noise():
  rows = swept([1e-3], [3.0], seeds=2) + OTHER
  rows[1]["loss"] = 3.0 * math.exp(0.01)
  cells = to_cells(rows)
  assert len(cells) == 2
  assert cells.loss[0] == pytest.approx(3.0 * math.exp(0.005))
  noise = 0.01 / math.sqrt(2)  # the standard deviation of two values 0.01 apart
  assert cells.loss_se[0] / cells.loss[0] == pytest.approx(noise / math.sqrt(2))
  assert cells.loss_se[1] / cells.loss[1] == pytest.approx(noise)
  assert cells.seeds.tolist() == [2, 1] and cells.seed_noise == pytest.approx(noise)
  assert np.isnan(to_cells(rows[1:]).seed_noise)


def test_the_envelope_has_an_error():
  rows = swept([1e-3, 2e-3, 4e-3], [3.1, 3.0, 3.1], seeds=2) + OTHER
  for row in rows[::2]:
    row["loss"] *= 1.002
  cells = to_cells(rows)
  # The vertex is the middle point: it has that point's error, of two seeds.
  assert cells.loss_se[0] / cells.loss[0] == pytest.approx(math.log(1.002) / 2, rel=1e-3)


def test_no_seeds_and_one_learning_rate_are_said_so():
  notes = " ".join(to_cells(rows_of(learning_rates=1)).notes)
  assert "one learning rate per cell" in notes and "no cell has two seeds" in notes


def test_tokens_make_cells_of_one_architecture():
  cells = to_cells(rows_of(learning_rates=1, n_cells=8, tokens=(1e9, 4e9)))
  assert len(cells) == 16 and cells.n_architectures == 8


def test_a_recipe_that_varies_between_cells_is_said_so():
  rows = [row | {"n_heads": 4 + i, "batch_tokens": 2**14 * (1 + i % 2)}
          for i, row in enumerate(rows_of(learning_rates=1, n_cells=8))]
  notes = " ".join(to_cells(rows).notes)
  assert "the recipe varies between cells in batch_tokens:" in notes


@pytest.mark.parametrize("rates, losses", [
    ([3.98e-3, 4e-3, 5.66e-3], [3.006, 3.0, 3.006]), ([2e-3, 3.6e-3, 4e-3], [3.01, 3.0, 3.006])])
def test_two_rates_that_nearly_coincide_make_no_curve(rates, losses):
  """Their parabola would lie below all that was measured, by what is noise."""
  cells = to_cells(swept(rates, losses) + OTHER)
  assert 2.996 < cells.loss[0] < 3.0 + 1e-9 and cells.seeds[0] >= 0.5


@pytest.mark.parametrize("name", ["n_shared_experts", "n_dense_layers"])
def test_what_is_active_beside_attention_is_told_where_it_varies(name):
  rows = [row | {name: str(int(row["n_exp"] > 8))} for row in swept([1e-3], [3.0]) + OTHER]
  assert any(f"varies between cells in {name}" in note for note in to_cells(rows).notes)
  same = [row | {name: "1"} for row in rows]
  assert not any("varies" in note for note in to_cells(same).notes)
