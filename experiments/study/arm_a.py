"""Arm A at full length with one run per cell: the grid on which b - c is estimated.

    python -m moe_jax.study.power --config=experiments/study/arm_a.py --law=paper-curved
"""

from experiments.study import arms
from moe_jax.grid import Grid


def get_grid() -> Grid:
  return Grid("study", arms.RECIPE, arms.at_full_length(shapes=arms.ARM_A))
