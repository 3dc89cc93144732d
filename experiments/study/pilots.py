"""Which learning rate suits which cell? Sweeps at the corners, apart from the grid.

Five rates a factor of sqrt(2) apart at the four corners of the smallest size, three a factor of 2
apart at those of the largest: of three that are nearer, the noise between seeds would hide which
is best. Fitted as lr*(N_total, s, n_exp) by moe_jax.study.learning_rate; an optimum at an
edge is refused, and its sweep widened here.
"""

from experiments.study import arms
from moe_jax.grid import Grid

STEPS = {arms.SIZES[0]: (-2, -1, 0, 1, 2), arms.SIZES[2]: (-2, 0, 2)}  # powers of sqrt(2)
# (N_total, (n_exp, n_topk, granularity)) -> steps that a refusal asked for, beyond those.
WIDENED: dict[tuple, tuple[float, ...]] = {}


def get_grid() -> Grid:
  cells = []
  for n_total, steps in STEPS.items():
    for shape in arms.CORNERS:
      for step in sorted({*steps, *WIDENED.get((n_total, shape), ())}):
        rate = float(f"{arms.LEARNING_RATES[n_total] * 2**(step / 2):.4g}")
        cells.append(arms.at_rate(arms.cell(n_total, *shape), rate))
  return Grid("study-pilots", arms.RECIPE, tuple(cells))
