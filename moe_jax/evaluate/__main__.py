"""Evaluates the finished cells of a grid, and writes a table, results.csv and a plot.

    python -m moe_jax.evaluate --config=experiments/quickstart.py

Losses that are up to date are not evaluated again; --inference and --tasks always run. Execution
flags control how the model runs, e.g. --config.execution.mesh.expert=4, or
--config.execution.microbatches=4 for smaller batches.

    --split=train --corpus=python      another split, another corpus
    --steps=all                        all checkpoints: loss and routing against step
    --compare=CELL_A,CELL_B            the paired loss difference over the same documents
    --inference                        measured prefill, decode and memory on these devices
    --tasks=heldout_cloze,heldout_choice   tasks of lm-evaluation-harness, or of --task_dir
    --report=FILE.html                 one page with all results and routing statistics
    --generate="The state of"          generates text with one cell
"""

import os
import sys

from absl import flags, logging

from moe_jax import cli, cluster
from moe_jax.errors import FieldError

_CONFIG = cli.define_config_flag()
_OUT = flags.DEFINE_string("out", "runs", "Directory of all experiments, local or gs://.")
_SPLIT = flags.DEFINE_string("split", "heldout", "Split to evaluate on: heldout or train.")
_CORPUS = flags.DEFINE_string("corpus", None, "Corpus to evaluate on, as in "
                              "--config.data.corpus; by default the run's own.")
_STEPS = flags.DEFINE_string("steps", None, "Checkpoints to evaluate in addition to the newest: "
                             "all, or steps such as 200,400.")
_COMPARE = flags.DEFINE_string("compare", None, "CELL_A,CELL_B: compares both over the same "
                               "documents.")
_INFERENCE = flags.DEFINE_bool("inference", False, "Measures the cost of inference here.")
_BATCH_SIZES = flags.DEFINE_string("batch_sizes", "1,8,32", "Batch sizes for --inference.")
_TASKS = flags.DEFINE_string("tasks", None, "lm-evaluation-harness tasks to run, NAME,NAME: the "
                             "project's own, those in --task_dir, or lm_eval's.")
_TASK_DIR = flags.DEFINE_string("task_dir", None, "Directory with more .yaml task files.")
_REPORT = flags.DEFINE_string("report", None, "Path of an .html report to write.")
_GENERATE = flags.DEFINE_multi_string("generate", None, "A prompt; may be given several times. "
                                      "Continues each instead of evaluating.")
_NEW_TOKENS = flags.DEFINE_integer("new_tokens", 64, "Maximum number per prompt.")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "Of sampling; 0 takes the most likely token.")
_TOP_K = flags.DEFINE_integer("top_k", 0, "Samples from this many most likely tokens; 0: from all.")
_TOP_P = flags.DEFINE_float("top_p", 1.0, "Samples from the smallest set of tokens whose "
                            "probabilities sum to at least this.")
_SEED = flags.DEFINE_integer("seed", 0, "Random seed of sampling.")

_OF_EVALUATION = ("split", "corpus", "steps", "compare", "inference", "batch_sizes", "tasks",
                  "task_dir", "report")
_OF_GENERATION = ("new_tokens", "temperature", "top_k", "top_p", "seed")


def main(overrides: list[str]) -> int:
  logging.set_verbosity(logging.WARNING)
  cells = cli.selected_cells(_CONFIG.value, overrides)
  if cluster.is_one_of_many(os.environ):
    print("error: evaluation runs in a single process, and this is one of several: start it "
          "once, on one host (runs trained by any number of processes can be evaluated there)",
          file=sys.stderr)
    return cli.EXIT_BAD_INPUT
  for name in _OF_EVALUATION if _GENERATE.value is not None else _OF_GENERATION:
    if flags.FLAGS[name].present:
      raise FieldError(name, flags.FLAGS[name].value, "cannot be combined with --generate, which "
                       "evaluates nothing" if name in _OF_EVALUATION else "requires --generate")
  return _evaluate(cells) if _GENERATE.value is None else _generate(cells)


def _evaluate(cells) -> int:
  from moe_jax.evaluate import compare, cost
  from moe_jax.evaluate.cells import evaluate_cells, parse_steps, survey
  from moe_jax.evaluate.text import Text
  from moe_jax.laws.publish.page import check_path
  text = Text(_SPLIT.value, _CORPUS.value)
  steps = () if _STEPS.value is None else parse_steps(_STEPS.value)
  sizes = cost.parse_batch_sizes(_BATCH_SIZES.value)
  if _BATCH_SIZES.present and not _INFERENCE.value:
    raise FieldError("batch_sizes", _BATCH_SIZES.value, "requires --inference")
  if _REPORT.value is not None:
    check_path(_REPORT.value)
  tasks = _read_tasks()
  if _COMPARE.value is not None:
    pair = compare.parse_pair(_COMPARE.value, [cell.name for cell in cells])
    cells = [cell for cell in cells if cell.name in pair]
  found = survey(cells, _OUT.value)
  for line in found.unfinished:
    _say(line)
  _complain(found.refused)
  if not found.finished:
    raise FieldError("out", _OUT.value, f"holds no finished cell of {_CONFIG.value}; train "
                     f"with: python -m launch.submit --config={_CONFIG.value} --out="
                     f"{_OUT.value}")
  problems = [*found.refused, *evaluate_cells(found.finished, _OUT.value, _say, text, steps)]
  if _INFERENCE.value:
    from moe_jax.evaluate.inference import measure_cells
    problems += measure_cells(found.finished, _OUT.value, sizes, _say)
  if tasks:
    from moe_jax.evaluate.harness import run
    problems += run.evaluate_cells(found.finished, _OUT.value, tasks, _TASK_DIR.value, _say)
  problems += _show(found.finished, text, bool(steps is None or steps), tasks)
  if _COMPARE.value is not None:
    for line in compare.compare(_OUT.value, found.finished, pair, text.name):
      _say(line)
  return 1 if problems else 0


def _read_tasks() -> tuple[str, ...]:
  """Returns the tasks named by --tasks, checked. Raises FieldError."""
  if _TASKS.value is None:
    if _TASK_DIR.value is not None:
      raise FieldError("task_dir", _TASK_DIR.value, "requires --tasks=NAME,NAME")
    return ()
  from moe_jax.evaluate.harness import catalogue, run
  names = catalogue.parse_tasks(_TASKS.value)
  run.quiet()
  catalogue.check(names, _TASK_DIR.value)
  return names


def _show(cells, text, with_curves: bool, tasks=()) -> list[str]:
  """Prints the tables, writes results.csv and the figures, and returns the problems it printed."""
  from moe_jax.evaluate import cost, curves, report, results, show
  from moe_jax.evaluate.text import HELDOUT
  experiment = cells[0].experiment
  rows, problems = results.collect(_OUT.value, experiment)
  by_cell = {row["cell"]: row for row in rows if row["evaluation"] == text.name}
  shown = [by_cell[cell.name] for cell in cells if cell.name in by_cell]
  if shown:
    problems += show.show(rows, shown, results.csv_path(_OUT.value, experiment))
    if tasks:
      from moe_jax.evaluate.harness import run
      run.show(tasks, shown)
    if with_curves:
      problems += curves.show(_OUT.value, experiment, text.name)
    if _INFERENCE.value:
      problems += cost.show(_OUT.value, cells, shown)
    if _REPORT.value is not None:
      own = {row["cell"]: row for row in rows if row["evaluation"] == HELDOUT}
      heldout = [own[cell.name] for cell in cells if cell.name in own]
      if heldout:
        print(*report.write(_REPORT.value, cells, _OUT.value, heldout)[:1], sep="\n")
      else:
        problems.append(f"{_REPORT.value}: not written: it covers the held-out split, which has "
                        "not been evaluated: run without --split and --corpus first")
  _complain(problems)
  return problems


def _generate(cells) -> int:
  from moe_jax.evaluate import generate
  from moe_jax.evaluate.sampling import Sampling
  if len(cells) != 1:
    raise FieldError("config", _CONFIG.value, f"selects {len(cells)} cells and --generate takes "
                     "one: add :CELL. Cells: " + ", ".join(cell.name for cell in cells))
  sampling = Sampling(_TEMPERATURE.value, _TOP_K.value, _TOP_P.value, _SEED.value)
  if _NEW_TOKENS.value < 1:
    raise FieldError("new_tokens", _NEW_TOKENS.value, "must be at least 1")
  from moe_jax.train.checkpoint_format import CheckpointError
  try:
    made = generate.generate(cells[0], _OUT.value, _GENERATE.value, _NEW_TOKENS.value, sampling,
                             lambda line: print(line, file=sys.stderr))
  except (CheckpointError, OSError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  for prompt, text in zip(_GENERATE.value, made, strict=True):
    print(f"{prompt}{text}", end="\n\n")
  return 0


def _say(line: str) -> None:
  print(line, flush=True)


def _complain(lines: list[str]) -> None:
  for line in lines:
    print(line, file=sys.stderr)


if __name__ == "__main__":
  cli.run(main)
