"""Files of weights in safetensors' format whose tensors may be written in any order and in parts.

A checkpoint's chunks hold parts of many experts, and a file of ours holds experts that lie in many
chunks. Read in the order of the files, every chunk would be read again for each of them; so the
files are laid out at first and filled in the order of the chunks. The library writes whole files
from memory only. Its format is 8 bytes with the length of a header in JSON, the header (each
tensor's type, shape and place), and the tensors (https://huggingface.co/docs/safetensors).
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
WHOLE = "model.safetensors"  # where one file holds all
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
_CODES = {"float32": "F32", "bfloat16": "BF16"}
_ALIGNMENT = 8  # of the first tensor


class _Place(NamedTuple):
  """Where a tensor's bytes are."""

  file: pathlib.Path
  offset: int


def plan(weights: Sequence[Weight], itemsize: int, shard_bytes: float) -> list[list[Weight]]:
  """The weights in their order, cut into files; a tensor is never cut."""
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
  """Files as large as they will be, and their index where there are several; zeros at first.

  Attributes:
    n_bytes: of all tensors.
  """

  def __init__(self, directory: pathlib.Path, planned: Sequence[Sequence[Weight]], dtype: str):
    """Lays the files out.

    Args:
      directory: that is there, for the files.
      planned: the weights of each file.
      dtype: of the tensors, of DTYPES.

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
        # A full disk is an error here, and where a map is written a signal that ends the process.
        os.posix_fallocate(opened.fileno(), 0, 8 + len(header) + end)
    for weight, begin in zip(shard, begins, strict=True):
      self._places[weight.name] = _Place(file, 8 + len(header) + begin)

  def tensor(self, weight: Weight) -> np.ndarray:
    """The tensor on disk: what is assigned to its parts is written, rounded to its type.

    It counts as memory of this process until it is let go.
    """
    place = self._places[weight.name]
    return np.memmap(place.file, self._dtype, "r+", place.offset, weight.shape)
