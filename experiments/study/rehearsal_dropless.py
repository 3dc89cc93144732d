"""Repeats the rehearsal dropless, with more seeds at the corners of the smaller size.

Drops confound the first rehearsal: a router that has not yet learned to balance drops most where
experts are many and sparse.
"""

from experiments.study import arms
from experiments.study.rehearsal import SHORT, first_rate, rehearsal, rehearsed
from moe_jax.grid import Grid


def get_grid() -> Grid:
  cells = [*rehearsed(), *arms.seeds_of(first_rate(arms.SIZES[0], *shape)
                                        for shape in arms.CORNERS)]
  return rehearsal("study-rehearsal-dropless", cells, SHORT | {"moe.dispatch": "dropless"})
