"""Measures how fast this device trains the study's models, and estimates the time of its grids.

    python -m benchmarks.study_speed
    python -m benchmarks.study_speed --study_minutes=60

Times whole steps (see benchmarks.population) of the densest and the sparsest shape, alone and in
populations of three, at the smallest and the largest size; speeds in between are interpolated.
Prints the minutes of each grid: of all its units, and of the longest one.
Estimates exclude compilation and evaluation, which other units' training can hide, and assume one
program at a time: the effect of several programs sharing the device is unknown. With
--study_minutes it prints the value of experiments/study/arms.TOKENS at which all grids would fit in
that time. Pass the same overrides as to the sittings: --config.execution.remat=rows.
"""

import math
from collections.abc import Sequence

from absl import flags

from benchmarks.population import measure
from experiments.study import arms, plan
from experiments.study.units import units_of
from moe_jax import cli
from moe_jax.arch import count
from moe_jax.design import answer
from moe_jax.errors import require
from moe_jax.fields import override
from moe_jax.grid import select
from moe_jax.memory import use_huge_pages
from moe_jax.population import deal
from moe_jax.text import aligned

_MINUTES = flags.DEFINE_float("study_minutes", None, "Minutes available for all grids together.")
_STEPS = flags.DEFINE_integer("study_steps", 10, "Number of steps in a pass.", lower_bound=1)

SHAPES = ((64, 32, 2.0), (64, 4, 2.0))
TOGETHER = 3


def speeds(steps: int, overrides: Sequence[str] = ()) -> dict[tuple[int, int], float]:
  """(size, 1 or TOGETHER) -> tokens/s, harmonic mean over SHAPES. Prints each measurement."""
  found = {}
  _print("size", "cell", "together", "step [ms]", "tokens/s", "compilation [s]")
  for size in (arms.SIZES[0], arms.SIZES[-1]):
    seconds: dict[int, list[float]] = {1: [], TOGETHER: []}  # seconds per token
    for shape in SHAPES:
      config = override(arms.cell(size, *shape), dict(map(cli.parse_override, overrides)))
      name = answer.name(config.arch)
      for row in measure(config, [1, TOGETHER], steps, passes=2):
        if "error" in row:
          _print(str(size), name, str(row["population"]), row["error"], "", "")
          continue
        seconds[row["population"]].append(1 / row["tokens_per_second"])
        _print(str(size), name, str(row["population"]), f"{row['step_ms']:.1f}",
               f"{row['tokens_per_second']:,.0f}", f"{row['compile_seconds']:.0f}")
    for together, each in seconds.items():
      each = each or seconds[1]  # if no population fits, its runs train alone
      require(bool(each), "config.execution.remat", config.execution.remat,
              f"lets no run of size {size} fit into this device's memory: try rows or full")
      found[size, together] = len(each) / sum(each)
  return found


def _print(size: str, cell: str, *others: str) -> None:
  print(f"{size:>8}  {cell:<22}" + "".join(f"{other:>17}" for other in others), flush=True)


def minutes(grid: str, known: dict[tuple[int, int], float]) -> dict[str, float]:
  """Estimated minutes of training of each unit of a grid, from the measured speeds."""
  ends = [math.log(arms.SIZES[0]), math.log(arms.SIZES[-1])]
  changes = {"execution.population": 8}
  found = {}
  for unit in units_of(select(str(plan.FOLDER / f"{grid}.py"), changes), lambda cell: False):
    seconds = 0.0
    for group in deal(unit.cells):
      config, together = group[0].config, 1 if len(group) == 1 else TOGETHER
      low, high = (math.log(known[size, together]) for size in (arms.SIZES[0], arms.SIZES[-1]))
      share = (math.log(count.n_total(config.arch)) - ends[0]) / (ends[1] - ends[0])
      steps = config.train.steps - (config.train.branch_step or 0)
      seconds += len(group) * steps * config.batch_tokens / math.exp(low + share * (high - low))
    found[unit.name] = seconds / 60
  return found


def main(overrides: list[str]) -> None:
  for one in overrides:
    require(one.startswith("--config.execution."), *one.removeprefix("--").partition("=")[::2],
            "would change what is trained: only --config.execution.PATH=VALUE is accepted")
  require(_MINUTES.value is None or _MINUTES.value > 0, "study_minutes", _MINUTES.value,
          "must be above 0")
  known = speeds(_STEPS.value, overrides)
  there = [grid for grid in plan.GRIDS if (plan.FOLDER / f"{grid}.py").exists()]
  of_grid = {grid: minutes(grid, known) for grid in there}
  print("\n".join(aligned([("grid", "all units", "longest unit")] + [
      (grid, f"{sum(units.values()):.1f} min", f"{max(units.values()):.1f} min")
      for grid, units in of_grid.items()])))
  total = sum(sum(units.values()) for units in of_grid.values())
  print(f"all: {total:.0f} minutes of training (an estimate)")
  if _MINUTES.value is not None:
    fits = int(arms.TOKENS * min(1.0, _MINUTES.value / total)) // 10**6 * 10**6
    print(f"in {_MINUTES.value:g} minutes: arms.TOKENS = {fits:_}")


if __name__ == "__main__":
  use_huge_pages()  # as the trainer does
  cli.run(main)
