"""Both arms at full length with one run per cell: the grid for separating the explanations.

    python -m moe_jax.study.power --config=experiments/study/both_arms.py --law=paper-active
    python -m moe_jax.study.power --config=experiments/study/both_arms.py --law=experts-or-core
"""

from experiments.study import arms
from moe_jax.grid import Grid


def get_grid() -> Grid:
  return Grid("study", arms.RECIPE, arms.at_full_length())
