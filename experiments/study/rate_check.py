"""Checks the fitted learning rates on six random cells that were not swept, at sqrt(2) either way.

    python -m moe_jax.study.learning_rate --results=runs/study-rate-check/results.csv \\
        --check=experiments/study/rates.json
"""

import random

from experiments.study import arms
from moe_jax.grid import Grid

_SEED, _CELLS = 0, 6


def get_grid() -> Grid:
  swept = {arms.cell(n_total, *shape).arch
           for n_total in (arms.SIZES[0], arms.SIZES[2]) for shape in arms.CORNERS}
  others = [config for config in arms.at_full_length() if config.arch not in swept]
  cells = [arms.at_rate(config, float(f"{config.train.learning_rate * 2**(step / 2):.3g}"))
           for config in random.Random(_SEED).sample(others, _CELLS) for step in (-1, 0, 1)]
  return Grid("study-rate-check", arms.RECIPE, tuple(cells))
