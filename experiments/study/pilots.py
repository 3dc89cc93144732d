"""Which learning rate suits which cell? Sweeps at the corners, apart from the grid.

Five rates a factor of sqrt(2) apart at the four corners of the smallest size, three at those of
the largest. Fitted as lr*(N_total, s, n_exp); an optimum at an edge is refused and its sweep
widened.
"""

import dataclasses
import itertools

from experiments.study import arms
from moe_jax.grid import Grid

STEPS = {arms.SIZES[0]: (-2, -1, 0, 1, 2), arms.SIZES[2]: (-1, 0, 1)}  # powers of sqrt(2)


def get_grid() -> Grid:
  cells = []
  for n_total, steps in STEPS.items():
    for config, step in itertools.product(arms.at_full_length((n_total,), arms.CORNERS), steps):
      rate = float(f"{config.train.learning_rate * 2**(step / 2):.4g}")
      cells.append(dataclasses.replace(
          config, train=dataclasses.replace(config.train, learning_rate=rate)))
  return Grid("study-pilots", arms.RECIPE, tuple(cells))
