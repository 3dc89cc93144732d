"""Defines plans: the files and commands of a submission, as pure values for a dry run to print."""

import dataclasses
import json
import shlex
from collections.abc import Sequence

from moe_jax.files import is_local


@dataclasses.dataclass(frozen=True)
class File:
  """A file that a submission writes atomically.

  Attributes:
    path: relative to `<out>/<experiment>/_slices/`.
    text: its content.
  """

  path: str
  text: str


@dataclasses.dataclass(frozen=True)
class SlicePlan:
  """One slice: a queued resource, a JobSet or an sbatch array.

  Attributes:
    name: name of the resource.
    cells: names of its cells, in the order in which they are trained.
    files: files to write before the commands run.
    commands: argument lists, never shell text. `{slices}` in an argument stands for the folder
      `<out>/<experiment>/_slices`, or for a local copy of it.
  """

  name: str
  cells: tuple[str, ...]
  files: tuple[File, ...]
  commands: tuple[tuple[str, ...], ...]


@dataclasses.dataclass(frozen=True)
class Plan:
  """All slices of a submission.

  Attributes:
    backend, experiment: their names.
    out: the folder of the slices' files.
    slices: one plan each.
    notes: what a person should know before money is spent, a line each.
  """

  backend: str
  experiment: str
  out: str
  slices: tuple[SlicePlan, ...]
  notes: tuple[str, ...] = ()


def with_folder(command: Sequence[str], folder: str) -> tuple[str, ...]:
  """Returns the command with `{slices}` replaced by a folder."""
  return tuple(argument.replace("{slices}", folder) for argument in command)


def to_text(plan: Plan) -> list[str]:
  """Returns lines that a shell can run once the files exist; all else is in comments."""
  lines, folder = [f"# {note}" for note in plan.notes], plan.out
  if not is_local(folder):  # from which gcloud and kubectl read no files
    lines.append(f"# below, _slices is a copy of {folder} in the current folder")
    folder = "_slices"
  for share in plan.slices:
    lines.append(f"# {share.name}: {len(share.cells)} cells: {', '.join(share.cells)}")
    lines += [f"# writes {plan.out}/{file.path}, {len(file.text.encode()):,} bytes"
              for file in share.files]
    lines += [shlex.join(with_folder(command, folder)) for command in share.commands]
  return lines


def to_json(plan: Plan) -> str:
  """Returns the whole plan, files included, as JSON for programs."""
  found = dataclasses.asdict(plan)
  for share in found["slices"]:
    share["commands"] = [with_folder(command, plan.out) for command in share["commands"]]
  return json.dumps(found, indent=1)
