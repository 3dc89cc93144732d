"""The rehearsal without drops once more, with a tenth of the tokens: 2M, with branches.

For two processors and some hours, in sittings; rehearsal_tenth_large.py has the rest.
"""

from experiments.study import arms
from experiments.study.rehearsal import GROUP, SHORT, rehearsal, rehearsed
from moe_jax.grid import Grid, trunk_and_branches

_SHORT = SHORT | {"moe.dispatch": "dropless", "train.steps": arms.TOKENS // 10 // GROUP,
                  "execution.checkpoint_every": 300}


def tenth(sizes) -> Grid:
  """Both arms, a run of each."""
  return rehearsal("study-rehearsal-tenth", rehearsed(sizes), _SHORT)


def get_grid() -> Grid:
  whole = tenth(arms.SIZES[:1])
  return Grid(whole.name, whole.recipe, tuple(
      run for config in whole.cells for run in trunk_and_branches(config, whole.recipe)))
