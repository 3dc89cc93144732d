"""Do n_exp and n_topk cancel? At one N_total and one sparsity, n_exp goes from 16 to 128.

There are two arms. In the first, granularity is fixed, so more experts leave fewer parameters for
depth and width; the paper reports a penalty for this. In the second, granularity grows with
n_exp, so that depth and width stay the same, and so does N_active (within 1.6 %; N_total within
0.3 %) except for the routers, which grow with n_exp. If the penalty vanishes there, it came from
the shrinking core and not from the number of experts. (In the first arm N_active shrinks along
with the core. No grid at fixed N_total and s can separate the two: N_active is the core plus
1 / s of the experts, and the experts are N_total minus the core.)

    python -m moe_jax.plan --config=experiments/cancel.py --topology=v5p-16
"""

import dataclasses

from experiments.scaling_law import RECIPE
from moe_jax import arch
from moe_jax.grid import Grid

N_TOTAL = 300_000_000
SPARSITY = 8
EXPERTS = (16, 32, 64, 128)
GRANULARITY = 2.0  # of the first arm, and of the cell that both arms share
MEETING = 32  # n_exp of the shared cell


def get_grid() -> Grid:
  limits = arch.IsoLimits(d_model_multiple=8, d_expert_multiple=4, max_shift=0.25)
  first = {n_exp: arch.solve(template=RECIPE.arch, n_total=N_TOTAL, n_exp=n_exp,
                             n_topk=n_exp // SPARSITY, aspect=64, granularity=GRANULARITY,
                             limits=limits).arch
           for n_exp in EXPERTS}
  common = first[MEETING]
  second = [dataclasses.replace(common, n_exp=n_exp, n_topk=n_exp // SPARSITY,
                                d_expert=common.d_expert * MEETING // n_exp)
            for n_exp in EXPERTS if n_exp != MEETING]
  cells = [dataclasses.replace(RECIPE, arch=shape) for shape in (*first.values(), *second)]
  return Grid("cancel", RECIPE, tuple(cells), N_TOTAL)
