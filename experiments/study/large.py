"""The study's largest size, both arms: run after its losses were predicted from the others."""

from experiments.study import arms
from moe_jax.grid import Grid


def get_grid() -> Grid:
  return arms.study(arms.SIZES[2:])
