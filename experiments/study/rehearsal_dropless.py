"""The rehearsal again without drops, and with more seeds at the corners of the smaller size.

What confounds the first one: a router that has not learned to balance drops most where experts are
many and sparse.
"""

from experiments.study import arms
from experiments.study.rehearsal import SHORT, rehearsal
from moe_jax.grid import Grid


def get_grid() -> Grid:
  cells = arms.at_full_length(arms.SIZES[:2]) + arms.more_seeds(arms.SIZES[0])
  return rehearsal("study-rehearsal-dropless", cells, SHORT | {"moe.dispatch": "dropless"})
