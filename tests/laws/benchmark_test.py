"""The benchmark of published fits, on files with planted laws."""

import csv

import numpy as np
import pytest

from benchmarks import law_fits, law_peers
from moe_jax.errors import FieldError
from moe_jax.laws.cells import Cells


def write(path, rows):
  with path.open("w", newline="") as file:
    writer = csv.DictWriter(file, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
  return str(path)


def test_outliers_are_left_out_one_at_a_time():
  rng = np.random.default_rng(0)
  size, tokens = 10**rng.uniform(7, 10, 60), 10**rng.uniform(9, 11, 60)
  loss = (1.8 + 480 / size**0.35 + 2000 / tokens**0.37) * np.exp(1e-3 * rng.standard_normal(60))
  loss[[3, 41]] *= [1.3, 1.1]
  rest = law_fits.without_outliers(Cells.of(loss, n_active=size, tokens=tokens), 2, 8)
  assert "cell 3" not in rest.names and "cell 41" not in rest.names and len(rest) == 58


def test_either_objective_is_reached_by_the_fit_that_minimizes_it():
  rng = np.random.default_rng(0)
  size, tokens = 10**rng.uniform(7, 10, 40), 10**rng.uniform(9, 11, 40)
  loss = (1.8 + 480 / size**0.35 + 2000 / tokens**0.37) * np.exp(3e-3 * rng.standard_normal(40))
  cells = Cells.of(loss, n_active=size, tokens=tokens)
  of_log, of_loss = law_peers.compare(cells, 8, published=False)[:2]
  planted = law_peers.reached("truth", lambda: (1.8, 480.0, 2000.0, 0.35, 0.37), cells)
  assert of_log.of_log < min(of_loss.of_log, planted.of_log)
  assert of_loss.of_loss < min(of_log.of_loss, planted.of_loss)
  published = law_peers.compare(cells, 8, published=True)[-1]
  assert published.fitter == "published, Besiroglu et al." and published.of_log > of_log.of_log


@pytest.mark.parametrize("bend", [0.0, 0.01])
def test_a_slope_that_bends_is_said_to(tmp_path, bend):
  rng = np.random.default_rng(0)
  rows = []
  for table, n_total, tokens in (("T9", 2e9, 114e9), ("T11", 6e9, 130e9)):
    for n_topk in (1, 2, 4, 8, 16, 32):
      x = np.log(n_topk)
      rows.append(dict(table=table, N=n_total, Na=n_total * n_topk / 88, D=tokens, E=88,
                       K=n_topk, bpc=0.5 * np.exp(-0.02 * x + bend / 2 * x**2
                                                  + 2e-4 * rng.standard_normal())))
  text = "\n".join(law_fits.li2026_lines(write(tmp_path / "li.csv", rows)))
  said = "is not constant" if bend else "does not vary significantly"
  assert text.count(said) == 2
  assert "a: REFUSED" in text and "b_minus_c: REFUSED" in text


def test_a_file_that_is_not_what_it_should_be(tmp_path):
  path = write(tmp_path / "x.csv", [{"loss": 1}])
  with pytest.raises(FieldError, match="lacks Model Size, Training FLOP"):
    law_fits.chinchilla_lines(path, 8)
  with pytest.raises(FieldError, match="cannot be read"):
    law_fits.tlm26_lines(str(tmp_path / "nope.csv"))
