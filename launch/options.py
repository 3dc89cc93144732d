"""Options of the backends: frozen dataclasses whose fields are flags of `launch.submit`.

A field's metadata holds its help; a field without a default is required by its backend. One flag
may belong to several backends.
"""

import dataclasses
import re
import types
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from absl import flags

from moe_jax.errors import FieldError, require
from moe_jax.fields import field_types, parse

T = TypeVar("T")

flags.disclaim_key_flags()  # the flags declared here are listed by --help of the command

# Names in Google Cloud, Kubernetes and SLURM; nothing that a shell or gcloud could misread.
WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/@:-]{0,254}")
_SECRET_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,99}")
_SECRET_MANAGER = re.compile(
    r"projects/[a-z0-9:.-]+/secrets/[A-Za-z0-9_-]+/versions/(latest|[0-9]+)")
_KUBERNETES = re.compile(r"kubernetes/[a-z0-9][a-z0-9.-]*/[A-Za-z0-9._-]+")
_FILE = re.compile(r"(/[A-Za-z0-9._-]+)+")


def option(text: str, **default: Any) -> Any:
  """Returns a dataclass field with its help; `default=...` makes it optional."""
  return dataclasses.field(metadata={"help": text}, **default)


def define_flags(backends: Iterable[types.ModuleType]) -> dict[str, flags.FlagHolder]:
  """Declares a flag for every field of the backends' `Options`, None unless given."""
  holders: dict[str, flags.FlagHolder] = {}
  users: dict[str, list[str]] = {}
  helps: dict[str, str] = {}
  for backend in backends:
    for field in dataclasses.fields(backend.Options):
      users.setdefault(field.name, []).append(backend.__name__.rpartition(".")[2])
      helps.setdefault(field.name, field.metadata["help"])
  for name, known in users.items():
    holders[name] = flags.DEFINE_string(name, None, f"[{', '.join(known)}] {helps[name]}")
  return holders


class _DryRunFlag(flags.Flag):
  """`--dry_run`, or `--dry_run=json`: absl's boolean flags take no value, others require one."""

  def __init__(self):
    super().__init__(
        flags.EnumParser(["", "true", "json", "false"]), flags.ArgumentSerializer(), "dry_run",
        "", "Print what would be run, but run nothing; --dry_run=json prints JSON.")
    self.boolean = True

  def _parse(self, argument: str | bool) -> str:
    text = super()._parse(str(argument).lower())
    return "" if text == "false" else text


def define_dry_run_flag() -> flags.FlagHolder:
  """Declares --dry_run, whose value is "" (not given), "true" or "json"."""
  return flags.DEFINE_flag(_DryRunFlag())


def from_flags(cls: type[T], backend: str, given: Mapping[str, str | None]) -> T:
  """Builds a backend's options from the flags' texts; None means that a flag was not given.

  Raises:
    FieldError: a flag belongs to another backend, a required one is missing, or a value is invalid.
  """
  hints = field_types(cls)
  fields = {field.name: field for field in dataclasses.fields(cls)}
  values = {}
  for name, text in given.items():
    if text is None:
      continue
    require(name in fields, name, text, f"is not an option of --backend={backend}, which has "
            + (", ".join("--" + other for other in fields) or "none"))
    values[name] = parse(text, hints[name], name)
  for name, field in fields.items():
    missing = name not in values and field.default is dataclasses.MISSING
    require(not missing, name, "", f"is required by --backend={backend}: "
            + field.metadata["help"])
  return cls(**values)


def require_words(options: Any, *names: str) -> None:
  """Raises FieldError unless these fields are plain words, tuples of them, or None."""
  for name in names:
    value = getattr(options, name)
    for word in value if isinstance(value, tuple) else (value,):
      require(word is None or WORD.fullmatch(word) is not None, name, word,
              "must be letters, digits and . _ / @ : - only, and begin with a letter or digit")


def require_python(path: str | None) -> None:
  """Raises FieldError unless `--python`, an interpreter on other machines, is absolute or None."""
  require(path is None or re.fullmatch(r"/[A-Za-z0-9._/-]+", path) is not None, "python", path,
          "must be an absolute path")


def parse_secrets(secrets: tuple[str, ...], kubernetes: bool = False) -> dict[str, str]:
  """Parses `NAME=WHERE` into variable -> where its value is stored. Never accepts a value itself.

  Args:
    secrets: the texts; WHERE is a Secret Manager version or a file on the machine that trains.
    kubernetes: WHERE is `kubernetes/SECRET/KEY` instead.

  Raises:
    FieldError: a text has another form; it is not repeated, since it may be a secret.
  """
  found = {}
  for entry in secrets:
    name, _, where = entry.partition("=")
    forms = (_KUBERNETES,) if kubernetes else (_SECRET_MANAGER, _FILE)
    if not _SECRET_KEY.fullmatch(name) or not any(form.fullmatch(where) for form in forms):
      accepted = ("NAME=kubernetes/SECRET/KEY" if kubernetes else
                  "NAME=projects/P/secrets/S/versions/latest or NAME=/file/on/the/machine")
      raise FieldError("secrets", "***", f"must be {accepted}, never the secret itself")
    found[name] = where
  return found


def require_path(name: str, path: str) -> None:
  """Raises FieldError unless shells, gcloud and sbatch all take the path literally."""
  require(re.fullmatch(r"[A-Za-z0-9_./][A-Za-z0-9_./:=+@-]*|gs://[A-Za-z0-9_./=+@-]+", path)
          is not None, name, path, "must be letters, digits and . _ / = + @ - only, since "
          "other machines read it")
