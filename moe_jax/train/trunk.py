"""Finds and restores the checkpoint that a branch starts from; see moe_jax/branch.py."""

import dataclasses
import os
from typing import Any

from moe_jax import config as config_lib
from moe_jax.branch import require_trunk
from moe_jax.errors import FieldError, require
from moe_jax.grid import Cell
from moe_jax.run_dir import RunDir
from moe_jax.train.checkpoint import Restored, restore_step
from moe_jax.train.checkpoint_files import checkpoint_steps


@dataclasses.dataclass(frozen=True)
class Trunk:
  """A checkpoint of a trunk.

  Attributes:
    run_dir: of the trunk.
    identity: hash of the trunk's identity.
    step: of the checkpoint.
  """

  run_dir: RunDir
  identity: str
  step: int

  @property
  def record(self) -> dict[str, Any]:
    """What the branch records about it in config.json, status.json and results.csv."""
    path = self.run_dir.path
    return {"run": f"{path.parent.name}/{path.name}", "identity": self.identity,
            "step": self.step}

  def restore(self, abstract_state: Any) -> Restored:
    """Restores the trunk's state at that step. Raises CheckpointError if it is damaged."""
    return restore_step(self.run_dir, self.step, abstract_state)


def find_trunk(out: str | os.PathLike, cell: Cell) -> Trunk | None:
  """Finds the checkpoint that a cell is yet to branch from; writes nothing.

  Args:
    out: directory of all experiments.
    cell: any cell.

  Returns:
    None if the cell is not a branch, or already has checkpoints of its own.

  Raises:
    FieldError: there is no such run or checkpoint, or the cell cannot branch from it.
  """
  run_dir = RunDir.of(out, cell)
  trunk_dir = run_dir.trunk(cell.config)
  if trunk_dir is None or checkpoint_steps(run_dir):
    return None
  field, reference = "config.train.branch_from", cell.config.train.branch_from
  config = trunk_dir.read_config()
  require(config is not None, field, reference, f"there is no run at {trunk_dir.path}: train "
          "the trunk first")
  try:
    require_trunk(cell.config, config)
  except FieldError as error:
    raise error.under("config") from None
  step, steps = cell.config.train.branch_step, checkpoint_steps(trunk_dir)
  require(step in steps, field, reference, f"the trunk has no checkpoint of step {step}; it has "
          + (f"those of {', '.join(map(str, steps))}" if steps else "none yet"))
  return Trunk(trunk_dir, config_lib.identity_hash(config), step)
