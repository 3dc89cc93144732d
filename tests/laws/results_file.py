"""A results.csv with a planted law, for the tests of this room."""

import csv
import pathlib

import numpy as np

from benchmarks.law_coverage import planted_rows
from moe_jax.laws.table import Row

TRUTH = {"c0": 3.0, "a": 0.09, "b_minus_c": 0.01, "c": 0.02, "d": 0.05}


def rows_of(seed: int = 0, **scenario) -> list[Row]:
  return [row | {"evaluation": "heldout", "corpus": "sotu", "step": 500, "steps": 500}
          for row in planted_rows(np.random.default_rng(seed), TRUTH, **scenario)]


def write(folder: pathlib.Path, rows: list[Row]) -> str:
  path = folder / "results.csv"
  with path.open("w", newline="") as file:
    writer = csv.DictWriter(file, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
  return str(path)
