"""What a design is said to know is what least squares knows, in simulation."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.errors import FieldError
from moe_jax.laws import intervals
from moe_jax.laws.cells import Cells
from moe_jax.laws.fit import fit
from moe_jax.laws.forms import form_for
from moe_jax.laws.information import Noise, degrees_of_freedom, design_of, noise_of
from moe_jax.laws.reduce import to_cells
from tests.laws.results_file import rows_of


def grid(seeds=1.0, tokens=(1e9,)):
  """Twelve architectures in two sizes, at each number of tokens."""
  shapes = [(n, e, k) for n in (1e7, 1e8) for e, k in ((8, 4), (8, 2), (16, 4), (16, 8),
                                                       (32, 4), (64, 8))]
  rows = np.array([(*shape, d) for shape in shapes for d in tokens]).T
  return Cells.of(np.ones(rows.shape[1]), n_total=rows[0], n_exp=rows[1], n_topk=rows[2],
                  tokens=rows[3], architecture=rows[:3].T, seeds=seeds)


def drawn(cells, noise, rng, n):
  """[n, N] errors of ln L."""
  of_architecture = rng.standard_normal((n, cells.n_architectures))[:, cells.architecture]
  return (noise.architecture * of_architecture
          + noise.seed / np.sqrt(cells.seeds) * rng.standard_normal((n, len(cells))))


@pytest.mark.parametrize("tokens", [(1e9,), (1e9, 4e9, 1.6e10)])
def test_the_covariance_is_that_of_least_squares(tokens):
  cells = grid(seeds=np.resize([1, 1, 4.0], 12 * len(tokens)), tokens=tokens)
  noise = Noise(0.003, 0.002)
  design = design_of(form_for("paper", cells), cells)
  errors = drawn(cells, noise, np.random.default_rng(0), 20_000)
  estimates = errors @ np.linalg.pinv(design.x_NP).T
  found, expected = np.cov(estimates.T), design.covariance(noise)
  scale = np.sqrt(np.outer(np.diag(expected), np.diag(expected)))
  np.testing.assert_allclose(found / scale, expected / scale, atol=0.04)
  assert design.standard_errors(noise)["c"] == pytest.approx(estimates[:, 3].std(), rel=0.03)


@settings(max_examples=25, deadline=None)
@given(st.floats(1e-4, 0.01), st.floats(0, 0.01), st.integers(2, 50))
def test_repeats_never_beat_the_noise_between_architectures(seed, architecture, seeds):
  one, many, floor = (design_of(form_for("paper", cells), cells).standard_errors(noise)
                      for cells, noise in ((grid(), Noise(seed, architecture)),
                                           (grid(seeds), Noise(seed, architecture)),
                                           (grid(), Noise(1e-9, architecture))))
  for name in one:
    assert floor[name] - 1e-12 <= many[name] < one[name]
    share = (architecture**2 + seed**2 / seeds) / (architecture**2 + seed**2)
    assert many[name] == pytest.approx(one[name] * np.sqrt(share))


def test_the_noise_of_a_grid_is_found_again():
  """Both components, on average over grids; the fit's own residuals and repeats."""
  found = []
  for seed in range(60):
    rng = np.random.default_rng(seed)
    rows = rows_of(seed, learning_rates=1, seeds=3, noise=0.004)
    by_cell = {(row["cell"], row["n_total"]): 0.006 * rng.standard_normal() for row in rows}
    for row in rows:
      # the planted rows miss their learning rate: that is drowned by what is added here
      row["loss"] *= np.exp(by_cell[row["cell"], row["n_total"]])
    found.append(np.square(noise_of(fit(to_cells(rows), "paper", n_starts=1))))
  seed, architecture = np.sqrt(np.mean(found, axis=0))
  assert seed == pytest.approx(0.004, rel=0.06)
  assert architecture == pytest.approx(0.0065, rel=0.1)


def test_noise_between_architectures_is_never_negative():
  fitted = fit(to_cells(rows_of(learning_rates=1)), "paper")
  assert 0 < noise_of(fitted, 0.001)[1] < 0.01
  assert noise_of(fitted, 0.1) == (0.1, 0)


def test_a_form_that_is_not_log_log_needs_its_coefficients():
  cells = to_cells(rows_of(tokens=(1e9, 4e9, 1.6e10), n_cells=12))
  form = form_for("paper-tokens", cells)
  with pytest.raises(FieldError, match="needs results"):
    design_of(form, cells)
  planted = {"ln_A": 5.0, "ln_B": 6.0, "ln_E": 0.5, "beta": 0.28, "a": 0.3, "b_minus_c": 0.02,
             "c": 0.03}
  theta = np.array([planted[p] for p in form.parameters])
  design = design_of(form, cells, theta)
  step = 1e-6
  for p in range(len(theta)):
    moved = theta + step * (np.arange(len(theta)) == p)
    slope = (form.log_loss(moved, cells) - form.log_loss(theta, cells)) / step
    np.testing.assert_allclose(design.x_NP[:, p], slope, atol=1e-4)


def test_degrees_of_freedom():
  assert degrees_of_freedom(12, 4, 12) == 8
  assert degrees_of_freedom(36, 5, 12) == 11
  assert degrees_of_freedom(4, 4, 4) == 1


def test_degrees_of_freedom_of_an_interval():
  """What the cluster jackknife's squared error scatters by, against chi-squared."""
  noise, c = Noise(0.003, 0.002), np.eye(5)[3]
  one_each = design_of(form_for("paper", grid()), grid())
  assert one_each.degrees_of_freedom(noise, c[:4]) == 8
  cells = grid(tokens=(1e9, 4e9))
  design = design_of(form_for("paper", cells), cells)
  rng = np.random.default_rng(0)
  left = np.eye(24) - design.x_NP @ np.linalg.pinv(design.x_NP)
  squared = [intervals._cluster_t(design.x_NP, left @ error, cells.architecture, 1, rng)[0][3]**2
             for error in drawn(cells, noise, rng, 1500)]
  assert design.degrees_of_freedom(noise, c) == pytest.approx(
      2 * np.mean(squared)**2 / np.var(squared), rel=0.25)


@pytest.mark.parametrize("seed,architecture", [(-1, 0.1), (0.1, 1), (0, 0), (float("nan"), 0.1)])
def test_bad_noise(seed, architecture):
  with pytest.raises(FieldError, match="_sd"):
    Noise(seed, architecture)
