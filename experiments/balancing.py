"""Load balance: by a loss, or by a bias on the selection?

The quickstart's model of 16 experts, four a token, once for each way: softmax with the balance
loss, softmax without one, and sigmoid scores with the selection bias of DeepSeek-V3 at two rates.
The lower load variation is better, if the held-out loss does not pay for it.

    python -m launch.submit --config=experiments/balancing.py --backend=local
    python -m moe_jax.evaluate --config=experiments/balancing.py

The rate of 1e-3 is DeepSeek-V3's, for hundreds of thousands of steps: a run of a few hundred
needs a higher one, or the bias has no time to get where it should.
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
