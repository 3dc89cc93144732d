"""The backends, i.e. where cells can run. Each is a module here, named as in `--backend`.

`local` runs cells on this machine:

    dry_run(jobs) -> list[str]           the exact shell lines that submit would run
    submit(jobs, parallel) -> int        runs them; returns the launcher's exit code

The others send cells to other machines. Planning is pure, and a dry run prints the plan:

    Options                              a frozen dataclass, whose fields become flags
    plan(jobs, options, code, out) -> Plan
    submit(plan, jobs, options, code, out) -> int
"""

import importlib
import pkgutil
import types

LOCAL = "local"


def names() -> list[str]:
  return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str) -> types.ModuleType:
  """Returns the backend called `name`, one of `names()`."""
  return importlib.import_module(f"{__name__}.{name}")


def remote() -> list[types.ModuleType]:
  """Returns all backends that send cells to other machines."""
  return [load(name) for name in names() if name != LOCAL]
