"""Writes safetensors files whose tensors can be filled in any order and in parts.

A checkpoint chunk holds parts of many experts, and an exported file holds experts from many chunks.
Writing file by file would read every chunk once per file, so all files are preallocated and then
filled chunk by chunk. The safetensors library cannot do this: it only writes whole files from
memory. The format is the length of a header in 8 bytes, the JSON header (each tensor's dtype, shape
and offsets), and the tensors (https://huggingface.co/docs/safetensors).
"""

import json
import os
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import ml_dtypes
import numpy as np

from moe_jax.export.layouts import Weight

INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"  # used if one file holds all tensors
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
_CODES = {"float32": "F32", "bfloat16": "BF16"}
_ALIGNMENT = 8  # bytes; alignment of the first tensor


class _Place(NamedTuple):
  """Position of a tensor's bytes."""

  file: pathlib.Path
  offset: int


def plan(weights: Sequence[Weight], itemsize: int, shard_bytes: float) -> list[list[Weight]]:
  """Splits the weights into files, in order; a single tensor is never split."""
  shards: list[list[Weight]] = [[]]
  room = shard_bytes
  for weight in weights:
    size = weight.size * itemsize
    if size > room and shards[-1]:
      shards.append([])
      room = shard_bytes
    shards[-1].append(weight)
    room -= size
  return shards


class Shards:
  """Preallocated safetensors files, zero until written, with an index if there are several.

  Attributes:
    n_bytes: total size of all tensors.
  """

  def __init__(self, directory: pathlib.Path, planned: Sequence[Sequence[Weight]], dtype: str):
    """Preallocates the files.

    Args:
      directory: an existing directory for the files.
      planned: the weights of each file.
      dtype: dtype of the tensors, a key of DTYPES.

    Raises:
      OSError: the disk has no room for them.
    """
    self._dtype = DTYPES[dtype]
    self._places: dict[str, _Place] = {}
    self.n_bytes = sum(weight.size for shard in planned for weight in shard) * self._dtype.itemsize
    for number, shard in enumerate(planned, start=1):
      name = WHOLE if len(planned) == 1 else f"model-{number:05d}-of-{len(planned):05d}.safetensors"
      self._lay_out(directory / name, shard, _CODES[dtype])
    if len(planned) > 1:
      (directory / INDEX).write_text(json.dumps({
          "metadata": {"total_size": self.n_bytes},
          "weight_map": {name: place.file.name for name, place in self._places.items()}},
          indent=2) + "\n")

  def _lay_out(self, file: pathlib.Path, shard: Sequence[Weight], code: str) -> None:
    said, end, begins = {"__metadata__": {"format": "pt"}}, 0, []
    for weight in shard:
      begins.append(end)
      end += weight.size * self._dtype.itemsize
      said[weight.name] = {"dtype": code, "shape": list(weight.shape),
                           "data_offsets": [begins[-1], end]}
    header = json.dumps(said, separators=(",", ":")).encode()
    header += b" " * (-len(header) % _ALIGNMENT)
    with file.open("wb") as opened:
      opened.write(len(header).to_bytes(8, "little") + header)
      opened.truncate(8 + len(header) + end)
      if hasattr(os, "posix_fallocate"):  # not on macOS
        # A full disk raises OSError here; on a write to the memory map it would raise SIGBUS.
        os.posix_fallocate(opened.fileno(), 0, 8 + len(header) + end)
    for weight, begin in zip(shard, begins, strict=True):
      self._places[weight.name] = _Place(file, 8 + len(header) + begin)

  def tensor(self, weight: Weight) -> np.ndarray:
    """Returns a writable memory map of the tensor; assigned values are rounded to its dtype.

    The map counts toward this process's memory until it is released.
    """
    place = self._places[weight.name]
    return np.memmap(place.file, self._dtype, "r+", place.offset, weight.shape)
