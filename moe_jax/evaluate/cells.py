"""The cells of a grid, one after another: one that cannot be evaluated stops no other."""

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from moe_jax import config as config_lib
from moe_jax import run_dir as run_dir_lib
from moe_jax.errors import FieldError
from moe_jax.evaluate.results import SEEN_THE_FUTURE
from moe_jax.grid import Cell
from moe_jax.run_dir import RunDir


class Survey(NamedTuple):
  """How the cells stand.

  Attributes:
    finished: cells whose training is done.
    unfinished: a line for each other cell: its name and its state.
    refused: a line for each cell whose directory cannot be used.
  """

  finished: list[Cell]
  unfinished: list[str]
  refused: list[str]


def survey(cells: Sequence[Cell], out: str | os.PathLike) -> Survey:
  """Looks at the run directories; needs no JAX."""
  found = Survey([], [], [])
  for cell in cells:
    run_dir = RunDir.of(out, cell)
    try:
      begun, status = run_dir.check_identity(cell), run_dir.read_status()
    except FieldError as error:
      found.refused.append(f"{cell.name}: refused: {error}")
      continue
    if begun and status.get("state") == run_dir_lib.FINISHED:
      found.finished.append(cell)
    else:
      found.unfinished.append(f"{cell.name}: skipped: {_state(run_dir, status)}")
  return found


def _state(run_dir: RunDir, status: dict[str, Any]) -> str:
  if not status:
    return "not trained yet"
  state = status["state"]
  if state == run_dir_lib.RUNNING and not run_dir.is_alive(status):
    state = "its process is gone"
  error = " ".join((status.get("error") or "").split())
  return (f"{state}, step {status.get('step')} of {status.get('steps')}"
          + (f": {error}" if error else ""))


def evaluate_cells(cells: Sequence[Cell], out: str | os.PathLike,
                   say: Callable[[str], None] = print) -> list[str]:
  """Evaluates finished cells into eval/heldout.json, where that is not done already.

  Args:
    cells: finished ones.
    out: directory of all experiments.
    say: gets a line for each cell, as soon as it is known.

  Returns:
    The lines of the cells that failed.
  """
  import jax
  from etils import epath

  from moe_jax.data.prepare import prepare
  from moe_jax.evaluate import heldout
  from moe_jax.train.checkpoint import CheckpointError
  from moe_jax.train.loop import use_compilation_cache

  use_compilation_cache(out)
  failed = []
  for number, cell in enumerate(cells, start=1):
    label = f"[{number}/{len(cells)}] {cell.name}: "
    run_dir = RunDir.of(out, cell)
    try:
      prepared = prepare(cell.config.data, epath.Path(out) / "_data")
      result = _kept(run_dir, cell, prepared.fingerprint)
      if result is None:
        result = heldout.evaluate(cell, run_dir, prepared)
        run_dir.write_eval(heldout.NAME, result)
        done = f"{result['seconds']:.1f} s"
      else:
        done = "was evaluated before"
    except (FieldError, CheckpointError, OSError) as error:  # OSError: the disk is full, ...
      failed.append(f"{label}failed: {error}")
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      failed.append(f"{label}failed: out of memory: raise "
                    "--config.execution.microbatches (smaller batches, the same result)")
    else:
      peeks = "" if cell.config.moe.causal else f" (NOT CAUSAL: {SEEN_THE_FUTURE})"
      say(f"{label}step {result['step']}, held-out loss {result['loss']:.4f}{peeks}, {done}")
      continue
    say(failed[-1])
  return failed


def _kept(run_dir: RunDir, cell: Cell, fingerprint: str) -> dict[str, Any] | None:
  """What an earlier evaluation found of the same checkpoint and text, if anything."""
  from moe_jax.evaluate import heldout
  from moe_jax.train.checkpoint_files import checkpoint_steps, content_hash

  try:
    old = run_dir.read_evals().get(heldout.NAME)
  except FieldError:  # damaged: done again
    return None
  steps = checkpoint_steps(run_dir)
  wanted = {"version": heldout.VERSION, "identity": config_lib.identity_hash(cell.config),
            "data_fingerprint": fingerprint, "step": steps[-1] if steps else None,
            "checkpoint": content_hash(run_dir, steps[-1]) if steps else None}
  return old if isinstance(old, dict) and wanted.items() <= old.items() else None
