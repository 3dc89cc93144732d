"""A fixed-budget ablation: at one N_total, deep and narrow or shallow and wide?

The experts are fixed (64, 8 of them active, granularity 1.8 to 2.2) and d_model / n_layers goes
from 17 to 224; N_total stays within 0.6 %, N_active within 5 %. If the loss has a broad minimum,
the scaling study can fix the ratio and vary the rest.

    python -m moe_jax.plan --config=experiments/depth_width.py --topology=v5p-16
"""

import dataclasses

from experiments.scaling_law import RECIPE
from moe_jax import arch
from moe_jax.grid import Grid

N_TOTAL = 300_000_000
ASPECTS = (16, 32, 64, 128, 256)


def get_grid() -> Grid:
  limits = arch.IsoLimits(d_model_multiple=32, d_expert_multiple=8, max_shift=0.25)
  cells = []
  for aspect in ASPECTS:
    shape = arch.solve(template=RECIPE.arch, n_total=N_TOTAL, n_exp=64, n_topk=8, aspect=aspect,
                       granularity=2.0, limits=limits)
    cells.append(dataclasses.replace(RECIPE, arch=shape.arch))
  return Grid("depth_width", RECIPE, tuple(cells), N_TOTAL)
