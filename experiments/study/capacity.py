"""Does the capacity factor change the findings? The study's s = 4 column at 1.25 instead of 2."""

import dataclasses

from experiments.study import arms
from moe_jax.grid import Grid


def get_grid() -> Grid:
  column = [shape for shape in arms.ARM_A if shape[0] == 4 * shape[1]]
  cells = [dataclasses.replace(config, moe=dataclasses.replace(config.moe, capacity_factor=1.25))
           for config in arms.at_full_length(arms.SIZES[:1], column)]
  return Grid("study-capacity", arms.RECIPE, tuple(cells))
