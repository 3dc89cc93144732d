"""A fixed-budget ablation: at one N_total and N_active, few wide experts or many fine ones?

Granularity g = d_model / d_expert goes from 1 to 8. n_exp and n_topk are proportional to it, so
depth and width stay the same, and so do N_total (within 0.3 %) and N_active (within 1.5 %) except
for the routers, which grow with n_exp.

    python -m moe_jax.plan --config=experiments/granularity.py --topology=v5p-16
"""

import dataclasses

from experiments.scaling_law import RECIPE
from moe_jax import arch
from moe_jax.grid import Grid

N_TOTAL = 300_000_000
GRANULARITIES = (1, 2, 4, 8)
EXPERTS_PER_G, TOPK_PER_G = 16, 2


def get_grid() -> Grid:
  """Solves for one shape; the others share its depth and width, with experts g times finer."""
  limits = arch.IsoLimits(d_model_multiple=32, d_expert_multiple=32, max_shift=0.01)
  base = arch.solve(template=RECIPE.arch, n_total=N_TOTAL, n_exp=EXPERTS_PER_G,
                    n_topk=TOPK_PER_G, n_layers=9, granularity=1.0, limits=limits).arch
  cells = [dataclasses.replace(RECIPE, arch=dataclasses.replace(
      base, n_exp=EXPERTS_PER_G * g, n_topk=TOPK_PER_G * g, d_expert=base.d_expert // g))
           for g in GRANULARITIES]
  return Grid("granularity", RECIPE, tuple(cells), N_TOTAL)
