"""The study's largest size, both arms; run only after predicting its losses from the others."""

from experiments.study import arms
from moe_jax.grid import Grid


def get_grid() -> Grid:
  return arms.study(arms.SIZES[2:])
