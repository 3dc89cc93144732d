"""Reads the state of cells from the files in their run directories alone."""

import dataclasses
import math
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from launch.jobs import STARTING, Launch, read_launch
from moe_jax.arch.count import n_active, n_total
from moe_jax.config import RunConfig, identity_difference, identity_hash
from moe_jax.errors import FieldError, require
from moe_jax.grid import Cell
from moe_jax.run_dir import FINISHED, RUNNING, RunDir, is_gone
from moe_jax.text import natural

# In addition to the trainer's own states (moe_jax.run_dir) and the launcher's (launch.jobs):
PENDING = "pending"  # nothing has run
DEAD = "dead"  # the status says running, but its process is gone or silent
STALE = "stale identity"  # the directory holds a run of another identity
DAMAGED = "damaged"  # a file cannot be read


@dataclasses.dataclass(frozen=True)
class CellState:
  """One row of the status table. What is unknown is None.

  Attributes:
    experiment, cell: the run's two names.
    identity: identity hash of the wanted run or, if none is given, of the run that is there.
    n_total, n_active: parameters without embedding and head.
    state: the trainer's, the launcher's, or one of those above.
    step, steps: steps done, and steps in total.
    loss: the latest training loss, in nats per token.
    tokens_per_second: the trainer's latest reading.
    heartbeat_age: seconds since the trainer last wrote its status.
    error: why it does not run, in one line.
  """

  experiment: str
  cell: str
  identity: str | None = None
  n_total: int | None = None
  n_active: int | None = None
  state: str = PENDING
  step: int | None = None
  steps: int | None = None
  loss: float | None = None
  tokens_per_second: float | None = None
  heartbeat_age: float | None = None
  error: str | None = None


def read_state(run_dir: RunDir, wanted: Cell | None = None) -> CellState:
  """Reads the state of the run in a directory.

  Args:
    run_dir: its directory, which need not exist.
    wanted: the cell that should be there; None accepts any.
  """
  row = CellState(run_dir.path.parent.name, run_dir.path.name)
  if wanted is not None:
    row = dataclasses.replace(row, **_facts(wanted.config))
  try:
    # Equal identity hashes save reading and comparing all fields: a grid has many runs.
    config = (None if row.identity is not None and run_dir.read_identity() == row.identity
              else run_dir.read_config())
    status = run_dir.read_status()
    launch = None if status.get("state") == FINISHED else read_launch(run_dir)
  except FieldError as error:
    return dataclasses.replace(row, state=DAMAGED, error=str(error))
  if wanted is None and config is not None:
    row = dataclasses.replace(row, **_facts(config))
  if wanted is not None and config is not None:
    differing = identity_difference(wanted.config, config)
    if differing:
      return dataclasses.replace(row, state=STALE, error="; ".join(differing))
  state, error = _judge(run_dir, status, launch)
  return dataclasses.replace(
      row, state=state, error=None if error is None else " ".join(error.split()),
      step=status.get("step"), steps=status.get("steps", row.steps),
      loss=_finite(status.get("loss")), tokens_per_second=status.get("tokens_per_second"),
      heartbeat_age=time.time() - status["heartbeat"] if status else None)


def states_of(out: str | os.PathLike, cells: Sequence[Cell]) -> list[CellState]:
  """Returns a row for each cell, launched or not, in the grid's order."""
  return [read_state(RunDir.of(out, cell), cell) for cell in cells]


def states_under(out: str | os.PathLike) -> list[CellState]:
  """Returns a row for every run under `out`. Raises FieldError if there is none."""
  found = sorted(epath.Path(out).glob("*/*/config.json"),
                 key=lambda file: natural("/".join(file.parts[-3:-1])))
  require(bool(found), "out", os.fspath(out), "holds no runs; --config=FILE lists the cells "
          "that an experiment would run")
  return [read_state(RunDir(file.parent)) for file in found]


def _finite(number: float | None) -> float | None:
  return number if number is not None and math.isfinite(number) else None


def _facts(config: RunConfig) -> dict[str, Any]:
  return {"identity": identity_hash(config), "n_total": n_total(config.arch),
          "n_active": n_active(config.arch), "steps": config.train.steps}


def _judge(run_dir: RunDir, status: Mapping[str, Any],
           launch: Launch | None) -> tuple[str, str | None]:
  """Returns (state, error) from the trainer's status or launch.json, whichever is later."""
  if run_dir.is_alive(status):
    return RUNNING, None
  if launch is not None and launch.started > status.get("heartbeat", 0):
    if launch.state == STARTING and is_gone(launch.host, launch.pid):
      return DEAD, f"process {launch.pid} ended before training started"
    return launch.state, launch.error
  if not status:
    return PENDING, None
  if status["state"] == RUNNING:
    if launch is not None and launch.pid == status["pid"] and launch.state != STARTING:
      return launch.state, launch.error
    return DEAD, f"process {status['pid']} on {status['host']} is gone or silent"
  return status["state"], status.get("error")
