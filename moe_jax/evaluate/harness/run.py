"""Tasks on the cells of a grid: eval/<task>.json for each run, and a table."""

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
_BOOTSTRAPS = 1000  # for the errors of metrics that are no means


def quiet() -> None:
  """Call it before lm_eval is imported: no bars, no warnings, no processes forked beside JAX."""
  os.environ |= {"TQDM_DISABLE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
                 "DATASETS_VERBOSITY": "critical",
                 "DISABLE_MULTIPROC": "1", "TOKENIZERS_PARALLELISM": "false"}
  for name in ("lm_eval", "datasets"):
    logger = logging.getLogger(name)
    logger.setLevel(logging.ERROR)
    logger.propagate = False
    logger.addHandler(logging.NullHandler())  # without one, Python prints by itself


def evaluate_cells(cells: Sequence[Cell], out: str | os.PathLike, names: Sequence[str],
                   task_dir: str | None = None, say: Callable[[str], None] = print) -> list[str]:
  """Asks the newest checkpoint of finished cells, again each time, into eval/<task>.json.

  Args:
    cells: finished ones.
    out: directory of all experiments.
    names: of tasks; see catalogue.check.
    task_dir: directory of more task files.
    say: gets a line for each cell.

  Returns:
    The lines of the cells that failed.
  """
  from moe_jax.evaluate.cells import each_cell
  from moe_jax.train.loop import use_compilation_cache
  use_compilation_cache(out)

  def work(cell: Cell, say: Callable[[str], None]) -> None:
    started = time.perf_counter()
    _evaluate_cell(cell, out, names, task_dir)
    say(f"tasks answered, {time.perf_counter() - started:.1f} s")

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
  """What lm_eval.simple_evaluate says. Raises FieldError for an error of a task."""
  from lm_eval import simple_evaluate

  from moe_jax.evaluate.harness.model import CheckpointLM
  model = CheckpointLM(answerer)
  try:
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it bootstraps
      return simple_evaluate(
          model=model, tasks=list(names), bootstrap_iters=_BOOTSTRAPS, log_samples=False,
          task_manager=catalogue.open_manager(names, suite_dir, task_dir))
  except Exception as error:
    if model.error is error:
      raise
    raise FieldError("tasks", ",".join(names),
                     f"cannot be evaluated: {catalogue.one_line(error)}") from error


def describe(name: str, found: Mapping[str, Any], asked: Sequence[str] = ()) -> dict[str, Any]:
  """What eval/<task>.json holds of a task, given lm_eval's answer to all that were asked.

  `columns` are those of results.csv: `TASK.METRIC`, `TASK.METRIC_se` its standard error; of a
  group that has no metric of its own those of the tasks that belong to it.
  """
  metrics = {task: of_task for task, result in found["results"].items()
             if (of_task := _metrics(result))}
  inside = _inside(name, found.get("group_subtasks") or {})
  shown = [name] if name in metrics else [task for task in inside if task in metrics]
  if not shown:  # a tag: its tasks stand under their own names, and are nobody else's
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
  """The tasks of a group, those of groups inside it too."""
  found = []
  for task in groups.get(name, ()):
    found += [task, *_inside(task, groups)]
  return list(dict.fromkeys(found))


def _metrics(result: Mapping[str, Any]) -> dict[str, float]:
  """`acc,none` -> acc and `acc_stderr,none` -> acc_se; a filter's name stays: acc.strict."""
  found = {}
  for key, value in result.items():
    metric, comma, kept = key.partition(",")
    if comma and isinstance(value, (int, float)):
      metric = metric.removesuffix("_stderr") + ("" if kept == "none" else f".{kept}") + (
          "_se" if metric.endswith("_stderr") else "")
      found[metric] = float(value)
  return found


def show(names: Sequence[str], rows: Sequence[Row]) -> None:
  """Prints a line a cell: every metric of the tasks, with its standard error."""
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
