"""The study's two smaller sizes, both arms, from which the largest is predicted."""

from experiments.study import arms
from moe_jax.grid import Grid


def get_grid() -> Grid:
  return arms.study(arms.SIZES[:2])
