"""The study's two smaller sizes with an eightieth of the tokens: a rehearsal, which claims nothing.

For two processors and an hour: one length, no branches, small batches, one of the corpora.
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
  """Both arms, as long as the study's."""
  return [first_rate(n_total, *shape) for n_total in sizes for shape in arms.ARM_A + arms.ARM_B]


def first_rate(n_total: int, *shape) -> RunConfig:
  """A cell at the rate where the sweeps begin, also when they have been fitted: rehearsed is
  rehearsed."""
  return arms.at_rate(arms.cell(n_total, *shape), arms.LEARNING_RATES[n_total])


def rehearsal(name: str, cells: Iterable[RunConfig], short: dict) -> Grid:
  """Cells of the study with fields of theirs set, and the recipe likewise."""
  return Grid(name, override(arms.RECIPE, short), tuple(override(cell, short) for cell in cells))
