"""Where cells can run. A backend is a module here; its name is what `--backend` takes.

It has two functions, both of the same jobs, already resolved and checked:

    dry_run(jobs) -> list[str]           the exact shell lines that submit would run
    submit(jobs, parallel) -> int        runs them; the launcher's exit code
"""

import importlib
import pkgutil
import types


def names() -> list[str]:
  return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str) -> types.ModuleType:
  """The backend of that name, one of `names()`."""
  return importlib.import_module(f"{__name__}.{name}")
