"""Evaluates the cells of a grid one by one; a cell that fails does not stop the others."""

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from moe_jax import config as config_lib
from moe_jax import run_dir as run_dir_lib
from moe_jax.errors import FieldError, require
from moe_jax.evaluate.compare import read_documents, write_documents
from moe_jax.evaluate.results import ROUTING, SEEN_THE_FUTURE
from moe_jax.evaluate.text import Text
from moe_jax.grid import Cell
from moe_jax.run_dir import RunDir


class Survey(NamedTuple):
  """The cells of a grid by state.

  Attributes:
    finished: cells whose training is done.
    unfinished: a line for each other cell, with its name and state.
    refused: a line for each cell whose run directory cannot be used.
  """

  finished: list[Cell]
  unfinished: list[str]
  refused: list[str]


def survey(cells: Sequence[Cell], out: str | os.PathLike) -> Survey:
  """Groups cells by the state of their run directories. No JAX."""
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
    state = "its process has died"
  error = " ".join((status.get("error") or "").split())
  return (f"{state}, step {status.get('step')} of {status.get('steps')}"
          + (f": {error}" if error else ""))


def parse_steps(text: str) -> tuple[int, ...] | None:
  """`200,400` -> (200, 400); `all` -> None, for every checkpoint. Raises FieldError."""
  if text == "all":
    return None
  parts = [part.strip() for part in text.split(",")]
  require(all(part.isdecimal() and 0 < int(part) < 2**53 for part in parts), "steps", text,
          "must be all, or steps of checkpoints such as 200,400")
  return tuple(sorted({int(part) for part in parts}))


def evaluate_cells(cells: Sequence[Cell], out: str | os.PathLike,
                   say: Callable[[str], None] = print, text: Text | None = None,
                   steps: Sequence[int] | None = ()) -> list[str]:
  """Evaluates finished cells and writes the results to eval/; skips those that are up to date.

  Args:
    cells: finished cells.
    out: directory of all experiments.
    say: called with each line of progress as soon as it is known.
    text: the text to evaluate on; the held-out split of each run's own data if None.
    steps: checkpoints to evaluate in addition to the newest sound one; None means all.

  Returns:
    An error line for each cell that failed.
  """
  from moe_jax.train.loop import use_compilation_cache

  use_compilation_cache(out)
  return each_cell(cells, lambda cell, say: _evaluate_cell(cell, out, text or Text(), steps, say),
                   say)


def each_cell(cells: Sequence[Cell], work: Callable[[Cell, Callable[[str], None]], None],
              say: Callable[[str], None]) -> list[str]:
  """Calls `work` on one cell after another; one that fails does not stop the others.

  Args:
    cells: the cells, in order.
    work: (cell, say) -> None; the `say` it gets prefixes each line with the cell's name.
    say: called with each line.

  Returns:
    An error line for each cell that failed.
  """
  failed = []
  for number, cell in enumerate(cells, start=1):
    label = f"[{number}/{len(cells)}] {cell.name}: "
    problem = _guarded(lambda cell=cell, label=label: work(cell, lambda line: say(label + line)))
    if problem is not None:
      failed.append(f"{label}failed: {problem}")
      say(failed[-1])
  return failed


def _guarded(work: Callable[[], None]) -> str | None:
  """Calls `work`; returns the message of an error that concerns only this cell, or None."""
  import jax

  from moe_jax.train.checkpoint import CheckpointError
  try:
    work()
  except (FieldError, CheckpointError, OSError) as error:  # OSError: the disk is full, ...
    return str(error)
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    return ("out of memory: raise --config.execution.microbatches (smaller batches, the same "
            "result)")
  return None


def _evaluate_cell(cell: Cell, out, text: Text, steps: Sequence[int] | None,
                   say: Callable[[str], None]) -> None:
  from etils import epath

  from moe_jax.data.prepare import prepare
  from moe_jax.evaluate import heldout
  from moe_jax.train.checkpoint_files import checkpoint_steps

  run_dir = RunDir.of(out, cell)
  own = prepare(cell.config.data, epath.Path(out) / "_data")
  prepared = text.prepare(cell.config, epath.Path(out) / "_data", own)
  there = checkpoint_steps(run_dir)
  wanted = there if steps is None else list(steps)
  for step in wanted:
    if step not in there:
      raise FieldError("steps", step, f"{run_dir.path} has no such checkpoint: it has "
                       f"{', '.join(map(str, there)) or 'none'}")
  peeks = "" if cell.config.moe.causal else f" (NOT CAUSAL: {SEEN_THE_FUTURE})"

  def evaluate(step: int | None):
    return heldout.evaluate(cell, run_dir, own, text=prepared, split=text.split, step=step,
                            keep_choices=bool(wanted))

  final = None
  for step in (None, *reversed(wanted)):
    result, done = _kept(run_dir, cell, prepared.fingerprint, text.name, step), ""
    if result is None:
      final = final or evaluate(None)  # routing at a step is compared with it
      found = final if step in (None, final.result["step"]) else evaluate(step)
      result, done = found.result, f"{found.result['seconds']:.1f} s"
      _write(run_dir, text, step, found, final)
    say(f"step {result['step']}, {text.name} loss {result['loss']:.4f}{peeks}, "
        f"{done or 'already evaluated'}")


def _write(run_dir: RunDir, text: Text, step: int | None, found, final) -> None:
  """Writes the evaluation `found`; `final` is the evaluation of the newest checkpoint."""
  if step is None:
    write_documents(run_dir, text.name, found.result, found.documents)
  if found.routing is not None and text == Text():
    told = {key: found.result[key] for key in _WHICH} | found.routing.result(found.labels)
    if step is not None:
      told["agreement"] = found.routing.agreement(final.routing)
    run_dir.write_eval(ROUTING, told, step)
  run_dir.write_eval(text.name, found.result, step)  # last: it marks the other files as complete


_WHICH = ("version", "step", "checkpoint", "identity", "data_fingerprint")


def _kept(run_dir: RunDir, cell: Cell, fingerprint: str, name: str,
          step: int | None) -> dict[str, Any] | None:
  """Returns an earlier result for the same checkpoint and text, or None if it must be redone."""
  from moe_jax.evaluate import heldout
  from moe_jax.train.checkpoint_files import checkpoint_steps, content_hash

  try:
    old = run_dir.read_eval(name, step)
  except FieldError:  # damaged: redo it
    return None
  steps = checkpoint_steps(run_dir)
  if not isinstance(old, dict) or not steps:
    return None
  newest = steps[-1] if step is None else step
  wanted = {"version": heldout.VERSION, "identity": config_lib.identity_hash(cell.config),
            "data_fingerprint": fingerprint, "step": newest,
            "checkpoint": content_hash(run_dir, newest)}
  if not wanted.items() <= old.items():
    return None
  # --compare needs the per-document file, which is written for the newest checkpoint only.
  return old if step is not None or read_documents(run_dir, name, old) is not None else None
