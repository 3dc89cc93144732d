"""A rehearsal of the study: its two smaller sizes with an eightieth of the tokens; claims nothing.

Takes an hour on two CPU cores: one length, no branches, small batches, one of the corpora.
"""

from collections.abc import Iterable

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
  return rehearsal("study-rehearsal", rehearsed(), SHORT)


def rehearsed(sizes=arms.SIZES[:2]) -> list[RunConfig]:
  """Returns both arms at the study's length; `rehearsal` shortens them."""
  return [first_rate(n_total, *shape) for n_total in sizes for shape in arms.ARM_A + arms.ARM_B]


def first_rate(n_total: int, *shape) -> RunConfig:
  """Returns a cell at the center rate of its sweep, even once rates are fitted, so that rehearsals
  that have run stay valid."""
  return arms.at_rate(arms.cell(n_total, *shape), arms.LEARNING_RATES[n_total])


def rehearsal(name: str, cells: Iterable[RunConfig], short: dict) -> Grid:
  """Returns cells of the study and its recipe with the fields in `short` overridden."""
  return Grid(name, override(arms.RECIPE, short), tuple(override(cell, short) for cell in cells))
