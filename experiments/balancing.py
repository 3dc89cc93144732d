"""Compares load balancing by an auxiliary loss with load balancing by a bias on the selection.

Trains the quickstart's model with 16 experts, four per token, in four variants: softmax with the
balance loss, softmax without it, and sigmoid scores with DeepSeek-V3's selection bias at two
update rates. Lower load variation is better, unless it comes at the cost of held-out loss.

    python -m launch.submit --config=experiments/balancing.py --backend=local
    python -m moe_jax.evaluate --config=experiments/balancing.py

The rate of 1e-3 is DeepSeek-V3's, for hundreds of thousands of steps. A run of a few hundred steps
needs a higher one, or the bias has no time to converge.
"""

import dataclasses

from experiments import quickstart
from moe_jax.grid import Grid

CELL = "l2-d108-f58-e16-k4"
ROUTERS = (
    {},
    {"balance_coef": 0.0},
    {"router": "sigmoid", "bias_update_rate": 1e-3},
    {"router": "sigmoid", "bias_update_rate": 1e-2},
)


def get_grid() -> Grid:
  recipe = quickstart.get_grid().get_config(CELL)
  cells = tuple(dataclasses.replace(recipe, moe=dataclasses.replace(recipe.moe, **router))
                for router in ROUTERS)
  return Grid("balancing", recipe, cells, quickstart.N_TOTAL)
