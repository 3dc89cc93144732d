"""Writes generated configurations as an experiment file that is ready to launch."""

import dataclasses
import json
import os
import pathlib
from typing import Any

from moe_jax import config as config_lib
from moe_jax.config import RunConfig
from moe_jax.errors import FieldError
from moe_jax.fields import leaves
from moe_jax.grid import Grid

_WIDTH = 100


def write_experiment(path: str | os.PathLike, grid: Grid, docstring: str) -> None:
  """Writes a file whose get_grid() returns `grid`; never overwrites a file.

  Raises:
    FieldError: the path does not end in .py, already exists, or cannot be written.
  """
  check_free(path)
  try:
    with open(path, "x", encoding="utf-8") as out:
      out.write(source(grid, docstring))
  except OSError as error:
    raise FieldError("write", str(path), f"cannot be written: {error.strerror}") from None


def check_free(path: str | os.PathLike) -> None:
  """Raises FieldError unless a new experiment file can be created at this path."""
  file = pathlib.Path(path)
  if file.suffix != ".py":
    raise FieldError("write", str(path), "must end in .py")
  if file.exists():
    raise FieldError("write", str(path), "exists, and is not overwritten")
  if not file.parent.is_dir():
    raise FieldError("write", str(path), "is in a directory that does not exist")


def source(grid: Grid, docstring: str) -> str:
  """Returns the source code of the file."""
  recipe = leaves(grid.recipe)
  cells = [{path: value for path, value in leaves(config).items() if value != recipe[path]}
           for config in grid.cells]
  used = sorted({"RunConfig", *_classes(grid.recipe)}, key=str.lower)
  imports = f"from moe_jax.config import {', '.join(used)}"
  if len(imports) > _WIDTH:
    imports = ("from moe_jax.config import (\n"
               + "".join(f"    {name},\n" for name in used) + ")")
  lines = [f'"""{docstring.strip()}', '"""', "", imports, "from moe_jax.fields import override",
           "from moe_jax.grid import Grid", "", f"RECIPE = {_call(grid.recipe, 0)}", "",
           "CELLS = [  # what each changes in the recipe"]
  lines += [_dict(changes) for changes in cells]
  lines += ["]", "", "", "def get_grid() -> Grid:",
            f"  return Grid({_literal(grid.name)}, RECIPE,",
            "              tuple(override(RECIPE, changes) for changes in CELLS), "
            f"n_total={grid.n_total!r})", ""]
  return "\n".join(lines)


def _changed(instance: Any) -> dict[str, Any]:
  """Returns the fields that are not at their defaults."""
  return {field.name: getattr(instance, field.name) for field in dataclasses.fields(instance)
          if getattr(instance, field.name) != field.default}


def _classes(instance: Any) -> set[str]:
  """Returns the names of the dataclasses needed to write `instance`."""
  found = {type(instance).__name__}
  for value in _changed(instance).values():
    if dataclasses.is_dataclass(value):
      found |= _classes(value)
  assert found <= set(config_lib.__all__), found
  return found


def _call(instance: Any, column: int) -> str:
  """Returns `Name(field=value, ...)` starting at a column, with wrapped lines aligned."""
  start = f"{type(instance).__name__}("
  if not isinstance(instance, RunConfig):
    parts = [f"{name}={_value(value, 0)}" for name, value in _changed(instance).items()]
    return _wrapped(start, parts, "),", column)[:-1]  # leaves room for the comma that follows
  parts = [f"    {name}=" + _value(value, len(name) + 5)
           for name, value in _changed(instance).items()]
  return start + "\n" + ",\n".join(parts) + ")"


def _value(value: Any, column: int) -> str:
  return _call(value, column) if dataclasses.is_dataclass(value) else _literal(value)


def _dict(changes: dict[str, Any]) -> str:
  parts = [f"{_literal(path)}: {_literal(value)}" for path, value in changes.items()]
  return "    " + _wrapped("{", parts, "},", 4)


def _literal(value: Any) -> str:
  return json.dumps(value) if isinstance(value, str) else repr(value)


def _wrapped(start: str, parts: list[str], end: str, column: int) -> str:
  """Joins parts with commas, wrapping lines under the bracket that `start` ends with."""
  pad = " " * (column + len(start))
  lines, line, width = [], start, _WIDTH - len(end)
  for i, part in enumerate(parts):
    part += "," if i < len(parts) - 1 else ""
    room = width - (column if not lines else 0)
    if i and len(line) + 1 + len(part) > room:
      lines.append(line)
      line = pad + part
    else:
      line += part if not i else " " + part
  return "\n".join([*lines, line + end])
