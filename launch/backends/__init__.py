"""Where cells can run. A backend is a module here; its name is what `--backend` takes.

`local` runs them on this machine:

    dry_run(jobs) -> list[str]           the exact shell lines that submit would run
    submit(jobs, parallel) -> int        runs them; the launcher's exit code

The others send them elsewhere. Planning is pure, and a dry run prints what it gives:

    Options                              a frozen dataclass, whose fields are flags
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
  """The backend of that name, one of `names()`."""
  return importlib.import_module(f"{__name__}.{name}")


def remote() -> list[types.ModuleType]:
  """All backends that send cells elsewhere."""
  return [load(name) for name in names() if name != LOCAL]
