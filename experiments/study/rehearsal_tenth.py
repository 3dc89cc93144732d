"""The rehearsal without drops once more, with a tenth of the tokens, and branches at 2M.

For two processors and about ten hours, in sittings.
"""

import dataclasses

from experiments.study import arms
from experiments.study.rehearsal import GROUP, SHORT, rehearsal, rehearsed
from moe_jax.grid import Grid, trunk_and_branches

TENTH = SHORT | {"moe.dispatch": "dropless", "train.steps": arms.TOKENS // 10 // GROUP,
                 "execution.checkpoint_every": 300}


def get_grid() -> Grid:
  whole = rehearsal("study-rehearsal-tenth", rehearsed(), TENTH)
  smaller, larger = whole.cells[:len(whole.cells) // 2], whole.cells[len(whole.cells) // 2:]
  branched = [run for config in smaller for run in trunk_and_branches(config, whole.recipe)]
  return dataclasses.replace(whole, cells=(*branched, *larger))
