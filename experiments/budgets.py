"""Gets several token budgets from one run: how does the loss fall with tokens?

A trunk trains at a constant learning rate, and branches decay from it at a quarter, half and all
of the tokens. Each branch is bitwise identical to a separate run of that length, and the trunk and
its three branches take 460 steps instead of the 700 of three separate runs.

    python -m launch.submit --config=experiments/budgets.py --backend=local --parallel=2
    python -m moe_jax.evaluate --config=experiments/budgets.py

The launcher runs the trunk first and keeps the checkpoints its branches start from.
"""

import dataclasses

from experiments import quickstart
from moe_jax.grid import Grid, trunk_and_branches

CELL = "l2-d80-f42-e32-k4"
STEPS = 400


def get_grid() -> Grid:
  longest = quickstart.get_grid().get_config(CELL)
  longest = dataclasses.replace(longest, train=dataclasses.replace(
      longest.train, steps=STEPS, decay_fraction=0.2))
  cells = trunk_and_branches(longest, longest, shares=(0.25, 0.5, 1.0))
  return Grid("budgets", longest, cells, quickstart.N_TOTAL)
