"""Populations: cells of one compiled shape that one process trains together. No JAX.

Cells that differ in nothing but a few numbers (seeds, learning rate, lengths of the schedule's
phases, weight decay, coefficients of the router's losses) or in the run whose parameters they begin
with run the same program on different arguments. So they share one compiled step, and several of
them fill a device that one alone would leave idle: `execution.population` says how many train
together at most. Each has its own run directory, which tells nothing of the others: a run that
began in a population may go on alone, and the other way.
"""

from collections.abc import Sequence

from moe_jax.config import RunConfig
from moe_jax.errors import FieldError
from moe_jax.fields import leaves, override
from moe_jax.grid import Cell

# What a compiled step takes as an argument or does not know of, and what stands in for it where
# it does not matter. (As long as they form a valid configuration, any values would do.)
_ARGUMENTS = {
    "seed_init": 0, "seed_data": 0,
    "moe.balance_coef": 0.0, "moe.z_coef": 0.0, "moe.bias_update_rate": 0.0,
    "train.steps": 1, "train.learning_rate": 1.0, "train.warmup_steps": 0,
    "train.decay_fraction": 0.0, "train.final_learning_rate_fraction": 0.0,
    "train.weight_decay": 0.0, "train.branch_from": None, "train.init_from": None,
    "execution.population": 1, "execution.log_every": 1, "execution.checkpoint_every": 1,
    "execution.keep_checkpoints": 1, "execution.keep_steps": ()}


def shape_of(config: RunConfig) -> RunConfig:
  """What a compiled step depends on: equal for cells that can share one."""
  return override(config, _ARGUMENTS)


def require_one_shape(cells: Sequence[Cell]) -> None:
  """Raises FieldError, which names the fields, unless all cells have the shape of the first."""
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
  """The cells in groups that train together, in the order in which they can be trained.

  A group has one shape and one length, so that none of its members waits for another, and at
  most as many cells as its members' `execution.population` says. Trunks come before branches, and
  a run before those that begin with its parameters.
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
