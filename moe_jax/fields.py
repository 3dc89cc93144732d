"""Frozen dataclasses as trees of typed fields: flatten, parse text, override, rebuild."""

import dataclasses
import functools
import math
import operator
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from moe_jax.errors import FieldError, did_you_mean

T = TypeVar("T")

_LARGEST_INT = 10**15  # exact in float64, in which sizes and times are computed


@functools.cache
def field_types(cls: type) -> dict[str, Any]:
  """Maps each field name to its resolved annotation."""
  hints = typing.get_type_hints(cls)
  return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


@functools.cache
def leaf_types(cls: type, prefix: str = "") -> dict[str, Any]:
  """Maps the dotted path of every leaf below the dataclass `cls` to its annotation."""
  found = {}
  for name, hint in field_types(cls).items():
    if dataclasses.is_dataclass(hint):
      found |= leaf_types(hint, f"{prefix}{name}.")
    else:
      found[prefix + name] = hint
  return found


def leaves(instance: Any) -> dict[str, Any]:
  """Maps the dotted path of every leaf below a dataclass instance to its value."""
  names, get = _leaf_getter(type(instance))
  try:
    values = get(instance) if len(names) > 1 else (get(instance),)
  except AttributeError:  # a section has the wrong type, which the caller reports
    return _walk(instance)
  return dict(zip(names, values, strict=True))


def _walk(instance: Any, prefix: str = "") -> dict[str, Any]:
  found = {}
  for name in field_types(type(instance)):
    value = getattr(instance, name)
    if dataclasses.is_dataclass(value):
      found |= _walk(value, f"{prefix}{name}.")
    else:
      found[prefix + name] = value
  return found


@functools.cache
def _leaf_getter(cls: type) -> tuple[tuple[str, ...], operator.attrgetter]:
  # One call for all leaves: names and hashes of a thousand cells read a million of them.
  names = tuple(leaf_types(cls))
  return names, operator.attrgetter(*names)


def parse(text: str, hint: Any, path: str) -> Any:
  """Parses `text` as the annotated type. Raises FieldError, which says what is accepted."""
  if typing.get_origin(hint) is typing.Literal:
    options = typing.get_args(hint)
    if text in options:
      return text
    raise FieldError(path, text, "must be " + " or ".join(map(repr, options)))
  if isinstance(hint, types.UnionType):
    (inner,) = [arg for arg in typing.get_args(hint) if arg is not types.NoneType]
    return None if text.lower() == "none" else parse(text, inner, path)
  if typing.get_origin(hint) is tuple:
    inner, _ = typing.get_args(hint)
    try:
      return tuple(parse(part, inner, path) for part in text.split(",") if text)
    except FieldError as error:
      raise FieldError(path, text, f"{error.accepted}, or several with commas between") from None
  if hint is bool:
    values = {"true": True, "1": True, "false": False, "0": False}
    if text.lower() in values:
      return values[text.lower()]
    raise FieldError(path, text, "must be true or false")
  if hint is int:
    try:
      return int(text)
    except ValueError:
      raise FieldError(path, text, "must be a whole number") from None
  if hint is float:
    try:
      number = float(text)
    except ValueError:
      number = math.nan
    if not math.isfinite(number):
      raise FieldError(path, text, "must be a finite number")
    return number
  assert hint is str, f"{path} has a type that flags cannot carry: {hint}"
  return text


def checked(value: Any, hint: Any, path: str) -> Any:
  """Returns `value` if it has the annotated type (an int is accepted as a float).

  Raises:
    FieldError: it has another type, is not one of a Literal's options, or is a number that is not
      finite or, if an int, too large.
  """
  if type(value) is int and abs(value) > _LARGEST_INT:
    raise FieldError(path, value, "is too large")
  if type(value) is hint and hint is not float:  # a float must also be finite
    return value
  if isinstance(hint, types.UnionType) and value is None:
    return None
  if typing.get_origin(hint) is tuple and isinstance(value, (tuple, list)):  # JSON has lists
    inner = typing.get_args(hint)
    inner = inner[:1] * len(value) if inner[1:] == (...,) else inner
    if len(inner) == len(value):
      return tuple(checked(part, kind, path) for part, kind in zip(value, inner, strict=True))
  if typing.get_origin(hint) is Mapping and isinstance(value, Mapping):
    _, inner = typing.get_args(hint)  # JSON's names are text
    return {name: checked(part, inner, path) for name, part in value.items()}
  if isinstance(value, str):
    inner = [arg for arg in typing.get_args(hint) if arg is not types.NoneType]
    kind = inner[0] if isinstance(hint, types.UnionType) else hint
    if kind is str or typing.get_origin(kind) is typing.Literal:
      return parse(value, kind, path)
  elif type(value) in (bool, int, float):
    read = parse(str(value), hint, path)
    if type(value) is type(read) or (type(value), type(read)) == (int, float):
      return read
  raise FieldError(path, value, f"must be of type {getattr(hint, '__name__', hint)}")


def override(instance: T, changes: Mapping[str, Any]) -> T:
  """A copy of the dataclass tree with the leaves at the given dotted paths replaced.

  All changes to one dataclass are made at once, so that its own check never sees a partially
  changed state.

  Raises:
    FieldError: an unknown path (the closest ones are suggested) or an invalid value.
  """
  types_by_name = field_types(type(instance))
  nested: dict[str, dict[str, Any]] = {}
  replaced: dict[str, Any] = {}
  for path, value in changes.items():
    head, _, rest = path.partition(".")
    if head not in types_by_name or bool(rest) != dataclasses.is_dataclass(types_by_name[head]):
      raise FieldError(path, value, "no such field; "
                       + did_you_mean(path, list(leaf_types(type(instance)))))
    if rest:
      nested.setdefault(head, {})[rest] = value
    else:
      replaced[head] = checked(value, types_by_name[head], head)
  for name, below in nested.items():
    try:
      replaced[name] = override(getattr(instance, name), below)
    except FieldError as error:
      raise error.under(name) from None
  return dataclasses.replace(instance, **replaced)


def from_dict(cls: type[T], values: Mapping[str, Any]) -> T:
  """Rebuilds a dataclass tree from nested dicts; every field must be present."""
  types_by_name = field_types(cls)
  for name in values:
    if name not in types_by_name:
      raise FieldError(name, values[name],
                       "no such field; " + did_you_mean(name, list(types_by_name)))
  built = {}
  for name, hint in types_by_name.items():
    if name not in values:
      raise FieldError(name, None, "is missing")
    if dataclasses.is_dataclass(hint):
      try:
        built[name] = from_dict(hint, values[name])
      except FieldError as error:
        raise error.under(name) from None
    else:
      built[name] = checked(values[name], hint, name)
  return cls(**built)


def from_json(cls: type[T], values: Any) -> T:
  """Builds a flat dataclass from parsed JSON; missing fields get their defaults.

  Raises:
    FieldError: a field is unknown, missing or invalid; names it.
  """
  types_by_name = field_types(cls)
  if not isinstance(values, Mapping):
    raise FieldError(cls.__name__, values, "must be an object with fields")
  for name in values:
    if name not in types_by_name:
      raise FieldError(name, values[name], "no such field")
  for field in dataclasses.fields(cls):
    if field.name not in values and (field.default, field.default_factory) == (
        dataclasses.MISSING, dataclasses.MISSING):
      raise FieldError(field.name, None, "is missing")
  return cls(**{name: checked(value, types_by_name[name], name)
                for name, value in values.items()})
