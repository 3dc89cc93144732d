"""Runs tasks on the cells of a grid: writes eval/<task>.json for each run, prints a table."""

import contextlib
import importlib.metadata
import io
import logging
import os
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import rich.box
import rich.table

from moe_jax.config import identity_hash, require_causal
from moe_jax.errors import FieldError
from moe_jax.evaluate.harness import catalogue, suite
from moe_jax.evaluate.results import Row
from moe_jax.evaluate.table import print_made
from moe_jax.grid import Cell
from moe_jax.run_dir import RunDir

VERSION = 1
_BOOTSTRAPS = 1000  # for the errors of metrics that are not means


def quiet() -> None:
  """Silences lm_eval and keeps it from forking next to JAX. Call before importing lm_eval."""
  os.environ |= {"TQDM_DISABLE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
                 "DATASETS_VERBOSITY": "critical",
                 "DISABLE_MULTIPROC": "1", "TOKENIZERS_PARALLELISM": "false"}
  for name in ("lm_eval", "datasets"):
    logger = logging.getLogger(name)
    logger.setLevel(logging.ERROR)
    logger.propagate = False
    logger.addHandler(logging.NullHandler())  # without a handler, Python prints to stderr


def evaluate_cells(cells: Sequence[Cell], out: str | os.PathLike, names: Sequence[str],
                   task_dir: str | None = None, say: Callable[[str], None] = print) -> list[str]:
  """Runs tasks on the newest checkpoint of finished cells, even if done before.

  Writes eval/<task>.json for each cell.

  Args:
    cells: finished cells.
    out: directory of all experiments.
    names: names of tasks; see catalogue.check.
    task_dir: directory with additional task files.
    say: called with a line for each cell.

  Returns:
    An error line for each cell that failed.
  """
  from moe_jax.evaluate.cells import each_cell
  from moe_jax.train.loop import use_compilation_cache
  use_compilation_cache(out)

  def work(cell: Cell, say: Callable[[str], None]) -> None:
    started = time.perf_counter()
    _evaluate_cell(cell, out, names, task_dir)
    say(f"tasks evaluated, {time.perf_counter() - started:.1f} s")

  return each_cell(cells, work, say)


def _evaluate_cell(cell: Cell, out, names: Sequence[str], task_dir: str | None) -> None:
  import jax
  from etils import epath

  from moe_jax.data.prepare import prepare
  from moe_jax.evaluate.generate import open_decoder
  from moe_jax.evaluate.harness.requests import Answerer
  from moe_jax.train.checkpoint_files import content_hash
  require_causal(cell.config)
  run_dir, data_dir = RunDir.of(out, cell), epath.Path(out) / "_data"
  own = prepare(cell.config.data, data_dir)
  suite_dir = suite.build(own, data_dir, names)
  step, decoder = open_decoder(cell, run_dir, own)
  started = time.perf_counter()
  found = ask(Answerer(decoder, own.tokenizer), names, suite_dir, task_dir)
  about = {"version": VERSION, "step": step, "checkpoint": content_hash(run_dir, step),
           "identity": identity_hash(cell.config), "data_fingerprint": own.fingerprint,
           "lm_eval": importlib.metadata.version("lm_eval"),
           "device_kind": jax.devices()[0].device_kind, "n_devices": len(jax.devices()),
           "seconds": round(time.perf_counter() - started, 2)}
  for name in names:
    run_dir.write_eval(name, about | describe(name, found, names))


def ask(answerer, names: Sequence[str], suite_dir: pathlib.Path, task_dir: str | None
        ) -> dict[str, Any]:
  """Returns the result of lm_eval.simple_evaluate. Raises FieldError for an error in a task."""
  from lm_eval import simple_evaluate

  from moe_jax.evaluate.harness.model import CheckpointLM
  model = CheckpointLM(answerer)
  try:
    with contextlib.redirect_stdout(io.StringIO()):  # it prints the metrics it bootstraps
      return simple_evaluate(
          model=model, tasks=list(names), bootstrap_iters=_BOOTSTRAPS, log_samples=False,
          task_manager=catalogue.open_manager(names, suite_dir, task_dir))
  except Exception as error:
    if model.error is error:
      raise
    raise FieldError("tasks", ",".join(names),
                     f"cannot be evaluated: {catalogue.one_line(error)}") from error


def describe(name: str, found: Mapping[str, Any], asked: Sequence[str] = ()) -> dict[str, Any]:
  """Returns the content of eval/<task>.json for a task, from lm_eval's result for all of `asked`.

  `columns` are those of results.csv: `TASK.METRIC` and its standard error, `TASK.METRIC_se`. A
  group without metrics of its own has the columns of its tasks.
  """
  metrics = {task: of_task for task, result in found["results"].items()
             if (of_task := _metrics(result))}
  inside = _inside(name, found.get("group_subtasks") or {})
  shown = [name] if name in metrics else [task for task in inside if task in metrics]
  if not shown:  # a tag: its tasks are listed by their own names; take those no other name claims
    groups = found.get("group_subtasks") or {}
    theirs = {task for other in asked if other != name for task in (other, *_inside(other, groups))}
    shown = [task for task in metrics if task not in theirs]
  counts = found.get("n-samples", {})
  return {"task": name, "questions": sum(
              counts[task]["effective"] for task in {name, *inside, *shown} if task in counts),
          "metrics": {task: metrics[task] for task in (*shown, *inside) if task in metrics},
          "columns": {f"{task}.{metric}": value for task in shown
                      for metric, value in metrics[task].items()}}


def _inside(name: str, groups: Mapping[str, Sequence[str]]) -> list[str]:
  """Returns the tasks of a group, including those of nested groups."""
  found = []
  for task in groups.get(name, ()):
    found += [task, *_inside(task, groups)]
  return list(dict.fromkeys(found))


def _metrics(result: Mapping[str, Any]) -> dict[str, float]:
  """Renames metrics: `acc,none` -> acc, `acc_stderr,none` -> acc_se, `acc,strict` -> acc.strict."""
  found = {}
  for key, value in result.items():
    metric, comma, kept = key.partition(",")
    if comma and isinstance(value, (int, float)):
      metric = metric.removesuffix("_stderr") + ("" if kept == "none" else f".{kept}") + (
          "_se" if metric.endswith("_stderr") else "")
      found[metric] = float(value)
  return found


def show(names: Sequence[str], rows: Sequence[Row]) -> None:
  """Prints one line per cell: every metric of the tasks, with its standard error."""
  columns = [column for column in dict.fromkeys(name for row in rows for name in row)
             if column.partition(".")[0] in names and not column.endswith("_se")]
  if not columns:
    return
  made = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False, caption_justify="left",
                          caption="± one standard error over the questions of a task.")
  made.add_column("cell", no_wrap=True)
  for column in columns:
    made.add_column(column, justify="right", no_wrap=True)
  for row in rows:
    made.add_row(row["cell"], *(_shown(row.get(column), row.get(f"{column}_se"))
                                for column in columns))
  print_made(made)


def _shown(value: float | None, se: float | None) -> str:
  if value is None:
    return "-"
  return f"{value:.4g}" if se is None else f"{value:.4g} ± {se:.2g}"
