"""Finds tasks by name and checks that they can be loaded.

A name is looked up in --task_dir, in the suite that ships with the project, and only then among
the thousands of lm_eval's own tasks, whose index takes seconds to read.
"""

import importlib.util
import logging
import pathlib
from collections.abc import Sequence

from moe_jax.errors import FieldError, did_you_mean, require
from moe_jax.evaluate.harness import suite
from moe_jax.evaluate.results import INFERENCE, ROUTING
from moe_jax.evaluate.text import SPLITS

_TAKEN = (ROUTING, INFERENCE, *SPLITS)


def parse_tasks(text: str) -> tuple[str, ...]:
  """Splits `heldout_cloze,arc_easy`. Raises FieldError, also if lm_eval is not installed."""
  names = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
  for name in names:
    require(name != "" and "/" not in name, "tasks", text, "must be names of tasks with commas "
            f"between them, such as {','.join(suite.NAMES)}")
    require(name not in _TAKEN and not name.endswith(tuple(f"-{split}" for split in SPLITS)),
            "tasks", name, "is the name of another evaluation in eval/: give the task another one")
  require(importlib.util.find_spec("lm_eval") is not None, "tasks", text,
          "needs lm-evaluation-harness: pip install 'moe_jax[eval]'")
  return names


def check(names: Sequence[str], task_dir: str | None) -> None:
  """Checks that the tasks are known and can build the requests of their first document.

  The suite's own tasks are left to `suite.build`, since they need a run's text.

  Raises:
    FieldError: a file of task_dir has an error; a task is unknown, cannot be loaded or cannot
      build requests from its first document.
  """
  if task_dir is not None:
    _check_files(task_dir)
  manager = open_manager(names, suite.TASKS, task_dir)
  for name in names:
    if name not in manager.all_tasks:
      raise FieldError("tasks", name, "no such task; " + did_you_mean(name, manager.all_tasks))
  for name in names:
    if name in suite.NAMES and manager.task_index[name].yaml_path.parent == suite.TASKS:
      continue
    heard = _Heard()
    try:
      with heard:
        for task in manager.load([name])["tasks"].values():
          if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
          task.build_all_requests(limit=1, rank=0, world_size=1)
    except Exception as error:  # task files can raise anything
      raise FieldError("tasks", name, "cannot be loaded: " + "; ".join(
          [*heard.lines, one_line(error)])) from None


def open_manager(names: Sequence[str], suite_dir: pathlib.Path, task_dir: str | None):
  """Returns lm_eval's TaskManager for these directories, with its own tasks only if needed."""
  from lm_eval.tasks import TaskManager
  paths = [str(suite_dir), *([] if task_dir is None else [task_dir])]
  local = TaskManager(include_path=paths, include_defaults=False)
  if all(name in local.all_tasks for name in names):
    return local
  return TaskManager(include_path=paths, include_defaults=True)


class _Heard(logging.Handler):
  """Collects the errors that lm_eval logs, which say more than the exception it then raises."""

  def __init__(self):
    super().__init__(logging.ERROR)
    self.lines: list[str] = []

  def emit(self, record):
    self.lines.append(" ".join(record.getMessage().split()))

  def __enter__(self):
    logging.getLogger("lm_eval").addHandler(self)
    return self

  def __exit__(self, *_):
    logging.getLogger("lm_eval").removeHandler(self)


def _check_files(task_dir: str) -> None:
  from lm_eval.tasks._yaml_loader import load_yaml
  require(pathlib.Path(task_dir).is_dir(), "task_dir", task_dir, "no such directory")
  files = sorted(pathlib.Path(task_dir).rglob("*.yaml"))
  require(bool(files), "task_dir", task_dir, "holds no .yaml file")
  for file in files:
    try:
      found = load_yaml(file, resolve_func=False, recursive=True)
    except Exception as error:  # from the parser or an included file
      raise FieldError("task_dir", str(file), f"cannot be read: {one_line(error)}") from None
    require(isinstance(found, dict), "task_dir", str(file), "is not a task: no fields")


def one_line(error: BaseException) -> str:
  """Formats an error as one line, with its causes; a short message gets the type in front."""
  if isinstance(error, StopIteration):
    return "it has no documents"
  text = " ".join(str(error).split())
  text = text if len(text) > 20 else f"{type(error).__name__} {text}".strip()
  return text if error.__cause__ is None else f"{text}: {one_line(error.__cause__)}"
