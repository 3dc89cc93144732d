"""The study's two smaller sizes with an eightieth of the tokens: a rehearsal, which claims nothing.

For two processors and an hour: one length, no branches, small batches, one of the corpora.
"""

import dataclasses
from collections.abc import Sequence

from experiments.study import arms
from moe_jax.config import RunConfig
from moe_jax.fields import override
from moe_jax.grid import Grid

BATCH_SIZE = 16
GROUP = BATCH_SIZE * arms.SEQ_LEN
SHORT = {"train.steps": arms.TOKENS // 80 // GROUP, "train.batch_size": BATCH_SIZE,
         "moe.routing_group_tokens": GROUP, "train.warmup_steps": 30, "data.corpus": "python-doc",
         "execution.checkpoint_every": 100}


def get_grid() -> Grid:
  return rehearsal("study-rehearsal", arms.at_full_length(arms.SIZES[:2]), SHORT)


def rehearsal(name: str, cells: Sequence[RunConfig], short: dict) -> Grid:
  """Cells of the study with fields of theirs set, and the recipe likewise."""
  whole = Grid(name, override(arms.RECIPE, short), tuple(cells))
  return dataclasses.replace(whole, cells=whole.override(short).cells)
