"""Reads and checks the weights in a Hugging Face directory."""

import hashlib
import json
import pathlib
from collections.abc import Iterable
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from moe_jax.errors import FieldError, require
from moe_jax.export.layouts import Weight
from moe_jax.export.shards import INDEX, WHOLE

_SHOWN = 3  # maximum number of tensor names in a message
_FLOATS = ("F32", "BF16", "F16", "F64")  # safetensors' names of dtypes


def read_json(directory: pathlib.Path, name: str) -> Any:
  """Reads a JSON file of the directory. Raises a FieldError for `hf`."""
  file = directory / name
  require(directory.is_dir(), "hf", str(directory), "is not a directory")
  require(file.is_file(), "hf", str(directory), f"has no {name}")
  try:
    return json.loads(file.read_text(encoding="utf-8"))
  except (json.JSONDecodeError, UnicodeDecodeError) as error:
    raise FieldError("hf", str(file), f"is damaged, not JSON: {error}") from None


class Weights:
  """Reads tensors by name, lazily."""

  def __init__(self, directory: pathlib.Path):
    """Opens all weight files. Raises a FieldError for `hf` if one is missing or damaged."""
    self._directory = directory
    if (directory / INDEX).is_file():
      index = read_json(directory, INDEX)
      located = index.get("weight_map") if isinstance(index, dict) else None
      require(isinstance(located, dict) and bool(located), "hf", str(directory / INDEX),
              "is damaged: no weight_map")
      require(all(isinstance(name, str) and "/" not in name for name in located.values()), "hf",
              str(directory / INDEX), "is damaged: weight_map must hold names of files")
    else:
      require((directory / WHOLE).is_file(), "hf", str(directory),
              f"has neither {WHOLE} nor {INDEX}")
      located = None
    files = sorted({WHOLE} if located is None else set(located.values()))
    self._files = {name: self._open(name) for name in files}
    held = {tensor: name for name, file in self._files.items()
            for tensor in file.keys()}  # noqa: SIM118
    lost = sorted(set(located or ()) - set(held))
    require(not lost, "hf", str(directory), f"lacks tensors that its index names: "
            f"{_some(lost)}")
    self._located = held

  @property
  def count(self) -> int:
    """Number of tensors."""
    return len(self._located)

  def _open(self, name: str):
    file = self._directory / name
    require(file.is_file(), "hf", str(self._directory), f"lacks {name}, which its index names")
    try:
      return safe_open(str(file), "np")
    except SafetensorError as error:
      raise FieldError("hf", str(file), f"is damaged or truncated: {error}") from None

  def check(self, wanted: Iterable[Weight]) -> None:
    """Checks that there are exactly these tensors, in these shapes and of floating point.

    Raises:
      FieldError: names `hf`; a tensor is missing, unexpected, or of another shape or type.
    """
    by_name = {weight.name: weight for weight in wanted}
    missing = [name for name in by_name if name not in self._located]
    require(not missing, "hf", str(self._directory), "lacks "
            f"{len(missing)} of {len(by_name)} tensors of its config.json: {_some(missing)}")
    more = sorted(name for name in self._located if name not in by_name)
    require(not more, "hf", str(self._directory), "has tensors that do not belong to the "
            f"model in its config.json: {_some(more)}")
    for name, weight in by_name.items():
      shape = tuple(self._slice(name).get_shape())
      require(shape == weight.shape, "hf", str(self._directory), f"{name} has the shape "
              f"{list(shape)}, but config.json implies {list(weight.shape)}")
      dtype = self._slice(name).get_dtype()
      require(dtype in _FLOATS, "hf", str(self._directory), f"{name} is of type {dtype}, and must "
              f"be of {', '.join(_FLOATS)}")

  def read(self, name: str) -> np.ndarray:
    """Reads a tensor as float32."""
    return np.asarray(self._files[self._located[name]].get_tensor(name), np.float32)

  def content_hash(self) -> str:
    """Returns eight hex digits of a hash of the weight files' content."""
    digest = hashlib.sha256()
    for name in self._files:
      with (self._directory / name).open("rb") as file:
        digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:8]

  def _slice(self, name: str):
    return self._files[self._located[name]].get_slice(name)


def _some(names: list[str]) -> str:
  return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
