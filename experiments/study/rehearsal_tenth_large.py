"""The 6M runs of rehearsal_tenth.py, predicted from the 2M runs before they start."""

from experiments.study import arms
from experiments.study.rehearsal_tenth import tenth
from moe_jax.grid import Grid


def get_grid() -> Grid:
  return tenth(arms.SIZES[1:2])
