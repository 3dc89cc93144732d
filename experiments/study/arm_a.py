"""Arm A at its full length and one run a cell: the grid that b - c is estimated on.

    python -m moe_jax.study.power --config=experiments/study/arm_a.py --law=paper-curved
"""

from experiments.study import arms
from moe_jax.grid import Grid


def get_grid() -> Grid:
  return Grid("study", arms.RECIPE, arms.at_full_length(shapes=arms.ARM_A))
