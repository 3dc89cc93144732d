"""Arrays of a checkpoint read piece by piece: for what never needs a model as a whole.

Orbax restores whole arrays, and one array here is a matrix of every expert of every layer. Its
files are TensorStore's, which reads any part: a chunk (64 MB at most) is in memory at a time.
"""

import os
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from moe_jax import run_dir as run_dir_lib
from moe_jax.run_dir import RunDir
from moe_jax.train import checkpoint_files as files
from moe_jax.train.checkpoint_format import META, PARAMS, require_same_arrays, require_version

_CACHE_BYTES = 400 * 10**6  # a chunk of each of three matrices holds several experts


class StoredParams:
  """The parameters of one checkpoint, on disk.

  Attributes:
    step: of the checkpoint.
    meta: what was saved beside it.
  """

  def __init__(self, run_dir: RunDir, abstract_params: Any, step: int | None = None):
    """Finds the checkpoint and checks its files, but reads no array.

    Args:
      run_dir: of the run.
      abstract_params: jax.ShapeDtypeStruct of every parameter.
      step: of the checkpoint; None means the newest sound one.

    Raises:
      CheckpointError: there is no such checkpoint, it is damaged, or holds other arrays.
    """
    self.step = files.sound_step(run_dir, step, (PARAMS, META))
    directory = files.step_dir(run_dir, self.step)
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
      self.meta = reader.restore(directory, args=ocp.args.Composite(
          **{META: ocp.args.JsonRestore()}))[META]
    require_version(directory, self.meta)
    require_same_arrays(directory, PARAMS, abstract_params)
    path = os.fspath(directory / PARAMS)
    self._base = f"file://{path}/" if run_dir_lib.is_local(directory) else f"{path}/"
    self._context = ts.Context({"cache_pool": {"total_bytes_limit": _CACHE_BYTES}})
    self._open: dict[tuple[str, ...], ts.TensorStore] = {}

  def read(self, path: tuple[str, ...], index: tuple[int, ...] = ()) -> np.ndarray:
    """The part `index` (of leading axes) of the array at `path`."""
    if path not in self._open:
      self._open[path] = ts.open({"driver": "zarr", "kvstore": {
          "driver": "ocdbt", "base": self._base, "path": ".".join(path) + "/"}},
          open=True, context=self._context).result()
    return np.asarray(self._open[path][(*index, ...)].read().result())


def tree_paths(tree: Any) -> dict[tuple[str, ...], Any]:
  """Nested dicts as path -> leaf."""
  return {tuple(key.key for key in path): leaf
          for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
