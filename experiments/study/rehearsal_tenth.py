"""Repeats the dropless rehearsal with a tenth of the study's tokens: the 2M size, with branches.

Takes some hours on two CPU cores, in several sittings; rehearsal_tenth_large.py has the 6M size.
"""

from experiments.study import arms
from experiments.study.rehearsal import GROUP, SHORT, rehearsal, rehearsed
from moe_jax.grid import Grid, trunk_and_branches

_SHORT = SHORT | {"moe.dispatch": "dropless", "train.steps": arms.TOKENS // 10 // GROUP,
                  "execution.checkpoint_every": 300}


def tenth(sizes) -> Grid:
  """Returns both arms, one run per cell."""
  return rehearsal("study-rehearsal-tenth", rehearsed(sizes), _SHORT)


def get_grid() -> Grid:
  whole = tenth(arms.SIZES[:1])
  return Grid(whole.name, whole.recipe, tuple(
      run for config in whole.cells for run in trunk_and_branches(config, whole.recipe)))
