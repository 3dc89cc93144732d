"""Reads the arrays of a checkpoint chunk by chunk, for code that never needs the whole model.

Orbax restores whole arrays, and one array here is a matrix of every expert of every layer. Its
files are TensorStore's, which can read any slice but decodes whole chunks (64 MB at most). A chunk
may contain a strip of each expert of every layer, so reading one expert at a time would decode
the whole array each time. Arrays are therefore read in the chunks they are stored in.
"""

import itertools
import os
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from moe_jax.files import is_local
from moe_jax.run_dir import RunDir
from moe_jax.train import checkpoint_files as files
from moe_jax.train.checkpoint_format import META, PARAMS, require_same_arrays, require_version

Path = tuple[str, ...]  # keys of an array in nested dicts


class StoredParams:
  """The parameters of one checkpoint, on disk.

  Attributes:
    step: of the checkpoint.
    meta: its metadata.
    shapes: of its arrays.
  """

  def __init__(self, run_dir: RunDir, abstract_params: Any, step: int | None = None):
    """Finds the checkpoint and checks its files, but reads no array.

    Args:
      run_dir: of the run.
      abstract_params: jax.ShapeDtypeStruct of every parameter.
      step: of the checkpoint; None means the newest sound one.

    Raises:
      CheckpointError: there is no such checkpoint, it is damaged, or it has other arrays.
    """
    self.step = files.sound_step(run_dir, step, (PARAMS, META))
    directory = files.step_dir(run_dir, self.step)
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
      self.meta = reader.restore(directory, args=ocp.args.Composite(
          **{META: ocp.args.JsonRestore()}))[META]
    require_version(directory, self.meta)
    require_same_arrays(directory, PARAMS, abstract_params)
    self.shapes: dict[Path, tuple[int, ...]] = {
        path: leaf.shape for path, leaf in tree_paths(abstract_params).items()}
    path = os.fspath(directory / PARAMS)
    self._base = f"file://{path}/" if is_local(directory) else f"{path}/"

  def chunks(self, path: Path) -> Iterator[tuple[tuple[slice, ...], np.ndarray]]:
    """Yields (slices, values) of every chunk of the array at `path`; reads each chunk once."""
    array = ts.open({"driver": "zarr", "kvstore": {
        "driver": "ocdbt", "base": self._base, "path": ".".join(path) + "/"}}, open=True).result()
    starts = (range(0, size, step) for size, step in zip(
        array.shape, array.chunk_layout.read_chunk.shape, strict=True))
    for corner in itertools.product(*starts):
      where = tuple(slice(start, min(start + step, size)) for start, step, size in zip(
          corner, array.chunk_layout.read_chunk.shape, array.shape, strict=True))
      yield where, array[where].read().result()


def tree_paths(tree: Any) -> dict[Path, Any]:
  """Flattens nested dicts to path -> leaf."""
  return {tuple(key.key for key in path): leaf
          for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
