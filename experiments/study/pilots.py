"""Learning-rate sweeps at the corners of the grid, to find the best rate for each cell.

Five rates a factor of sqrt(2) apart at the four corners of the smallest size, and three a factor
of 2 apart at those of the largest: with three closer rates, the noise between seeds would hide
which is best. moe_jax.study.learning_rate fits lr*(N_total, s, n_exp) to them; it refuses an
optimum at the edge of a sweep, which must then be widened here.
"""

from experiments.study import arms
from moe_jax.grid import Grid

STEPS = {arms.SIZES[0]: (-2, -1, 0, 1, 2), arms.SIZES[2]: (-2, 0, 2)}  # powers of sqrt(2)
# (N_total, (n_exp, n_topk, granularity)) -> additional steps that a refusal asked for.
WIDENED: dict[tuple, tuple[float, ...]] = {}


def get_grid() -> Grid:
  cells = []
  for n_total, steps in STEPS.items():
    for shape in arms.CORNERS:
      for step in sorted({*steps, *WIDENED.get((n_total, shape), ())}):
        rate = float(f"{arms.LEARNING_RATES[n_total] * 2**(step / 2):.4g}")
        cells.append(arms.at_rate(arms.cell(n_total, *shape), rate))
  return Grid("study-pilots", arms.RECIPE, tuple(cells))
