"""Populations: cells of one shape, which share a compiled step and train together. No JAX.

Cells that differ only in a few numbers (seeds, learning rate, lengths of the schedule's phases,
weight decay, coefficients of the router's losses) or in the run they are initialized from run the
same program with different arguments. So they share one compiled step, and several of them can
fill a device that one alone would leave idle; `execution.population` is the maximum number that
train together. Each has its own run directory, which does not depend on the others: a run that
began in a population may resume alone, and vice versa.
"""

from collections.abc import Sequence

from moe_jax.config import RunConfig
from moe_jax.errors import FieldError
from moe_jax.fields import leaves, override
from moe_jax.grid import Cell

# Fields that the compiled step takes as arguments or does not use, with placeholder values. (Any
# values would do that form a valid configuration.)
_ARGUMENTS = {
    "seed_init": 0, "seed_data": 0,
    "moe.balance_coef": 0.0, "moe.z_coef": 0.0, "moe.bias_update_rate": 0.0,
    "train.steps": 1, "train.learning_rate": 1.0, "train.warmup_steps": 0,
    "train.decay_fraction": 0.0, "train.final_learning_rate_fraction": 0.0,
    "train.weight_decay": 0.0, "train.branch_from": None, "train.init_from": None,
    "execution.population": 1, "execution.log_every": 1, "execution.checkpoint_every": 1,
    "execution.keep_checkpoints": 1, "execution.keep_steps": ()}


def shape_of(config: RunConfig) -> RunConfig:
  """`config` reduced to what the compiled step depends on: equal for cells that can share one."""
  return override(config, _ARGUMENTS)


def require_one_shape(cells: Sequence[Cell]) -> None:
  """Raises FieldError, which names the differing fields, unless all cells have the same shape."""
  first, *others = cells
  ours = leaves(shape_of(first.config))
  for cell in others:
    theirs = leaves(shape_of(cell.config))
    differing = [f"{path} is {ours[path]!r} in {first.name} and {theirs[path]!r} in {cell.name}"
                 for path in ours if ours[path] != theirs[path]]
    if differing:
      raise FieldError("config.execution.population", cell.config.execution.population,
                       "trains cells of one shape together: " + "; ".join(differing[:3]))


def deal(cells: Sequence[Cell]) -> list[tuple[Cell, ...]]:
  """Groups the cells that train together, in an order in which they can be trained.

  The cells of a group have the same shape and length, so that none waits for another, and
  there are at most `execution.population` of them. Trunks come before their branches, and a run
  before those that are initialized from it.
  """
  by_name = {cell.name: cell for cell in cells}
  by_path = {f"{cell.experiment}/{cell.name}": cell for cell in cells}

  def depth(cell: Cell, *later: Cell) -> int:
    train = cell.config.train
    first = by_name.get(train.branch_run), by_path.get(train.init_run)
    return max((1 + depth(other, cell, *later) for other in first
                if other is not None and other not in (cell, *later)), default=0)

  alike: dict[tuple, list[Cell]] = {}
  for cell in sorted(cells, key=depth):
    train, limit = cell.config.train, cell.config.execution.population
    key = depth(cell), train.branch_step, train.steps, limit, shape_of(cell.config)
    alike.setdefault(key if limit > 1 else (cell.name,), []).append(cell)
  return [tuple(group[i:i + group[0].config.execution.population])
          for group in alike.values()
          for i in range(0, len(group), group[0].config.execution.population)]
