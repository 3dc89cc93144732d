"""The study's two smaller sizes with a tenth of the tokens: a rehearsal, which claims nothing.

For two processors and a night: one length, no branches, float32.
"""

import dataclasses

from experiments.study import arms
from moe_jax.fields import override
from moe_jax.grid import Grid

SHORT = {"train.steps": arms.RECIPE.train.steps // 10, "train.warmup_steps": 30,
         "model.compute_dtype": "float32", "execution.checkpoint_every": 100}


def get_grid() -> Grid:
  whole = Grid("study-rehearsal", override(arms.RECIPE, SHORT),
               arms.at_full_length(arms.SIZES[:2]))
  return dataclasses.replace(whole, cells=whole.override(SHORT).cells)
