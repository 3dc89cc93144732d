"""The format of checkpoints, and how they are read.

A checkpoint `checkpoints/<step>/` has these Orbax items:

    params      the parameters: state["params"], nested dicts of arrays
    router      the routers' state beside their parameters: state["router"]; only if there is any
    optimizer   every other entry of the state, under its own name
    data        JSON: the position of the data iterator
    meta        JSON: format_version and the caller's metadata

Parameters and router are separate items so that an evaluation neither reads nor checks the
optimizer, which is twice as large. Any pytree can be saved: its leaves are stored under the
names of their paths, so no class of this project or of optax is part of the format.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

FORMAT_VERSION = 1

PARAMS, ROUTER, OPTIMIZER, DATA, META = "params", "router", "optimizer", "data", "meta"


# Maximum size of the chunks that arrays are stored in. A device that needs part of an array written
# on another mesh then reads little more than that part.
_CHUNK_BYTES = 64 * 10**6

# A file is buffered in memory until it reaches this size. Orbax's default is 2 GB, in addition to
# the arrays themselves.
_FILE_BYTES = 256 * 10**6


class CheckpointError(RuntimeError):
  """A checkpoint cannot be written or read; the message is one line."""


def save_args(state: Mapping[str, Any], data: Any, meta: Mapping[str, Any]
              ) -> ocp.args.Composite:
  """Returns Orbax's arguments for saving; `state` has `params`, `data` and `meta` are JSON."""
  chunked = ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES)
  items = {name: ocp.args.PyTreeSave(tree, save_args=jax.tree.map(lambda _: chunked, tree),
                                     ocdbt_target_data_file_size=_FILE_BYTES)
           for name, tree in _items(state).items()}
  return ocp.args.Composite(
      **items, data=ocp.args.JsonSave(data),
      meta=ocp.args.JsonSave({"format_version": FORMAT_VERSION, **meta}))


def read(directory: epath.Path, abstract_state: Mapping[str, Any],
         model_only: bool = False) -> tuple[Any, Any, dict[str, Any]]:
  """Reads (state, data, meta) from the checkpoint at `directory`, without checking for damage.

  Args:
    directory: of one step.
    abstract_state: the state, or a subset of its entries, as jax.ShapeDtypeStruct, with the
      shardings to restore to.
    model_only: for a model that is not trained further: `data` is None, and floats are rounded to
      the requested dtype, which may differ from the stored one.

  Raises:
    CheckpointError: another format version, or other arrays.
  """
  with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
    json_items = {name: ocp.args.JsonRestore()
                  for name in ((META,) if model_only else (DATA, META))}
    plain = reader.restore(directory, args=ocp.args.Composite(**json_items))
  require_version(directory, plain[META])
  wanted = _items(jax.tree.map(_placed, abstract_state))
  stored = {name: require_same_arrays(directory, name, tree, model_only)
            for name, tree in wanted.items()}
  restored = {}
  for name, tree in wanted.items():
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(
        restore_concurrent_gb=in_flight_gb(stored[name], tree))) as reader:
      restored[name] = reader.restore(directory / name, args=ocp.args.PyTreeRestore(
          tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree)))
  nested = {name: restored.get(name, {}) for name in (PARAMS, ROUTER)}
  nested |= restored.get(OPTIMIZER, {})
  return _unnamed(nested, abstract_state), plain.get(DATA), plain[META]


def _named(tree: Any) -> Any:
  """Converts any pytree to nested dicts, keyed by the names in its leaves' paths."""
  nested: dict[str, Any] = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    *folders, name = [jax.tree_util.keystr((key,), simple=True) for key in path]
    inner = nested
    for folder in folders:
      inner = inner.setdefault(folder, {})
    inner[name] = leaf
  return nested


def _unnamed(nested: Any, like: Any) -> Any:
  """The inverse of `_named`, for a tree with the structure of `like`."""
  leaves = []
  for path, _ in jax.tree_util.tree_leaves_with_path(like):
    leaf = nested
    for key in path:
      leaf = leaf[jax.tree_util.keystr((key,), simple=True)]
    leaves.append(leaf)
  return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _items(state: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
  """Splits a state into Orbax items, nested dicts of arrays; omits empty items."""
  rest = {name: value for name, value in state.items() if name not in (PARAMS, ROUTER)}
  items = {PARAMS: _named(state[PARAMS]), ROUTER: _named(state.get(ROUTER, {})),
           OPTIMIZER: _named(rest)}
  return {name: tree for name, tree in items.items() if tree}


def _placed(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
  """Adds a missing sharding, without which Orbax looks for the devices that wrote the array."""
  if leaf.sharding is not None:
    return leaf
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=jax.sharding
                              .SingleDeviceSharding(jax.devices()[0]))


def in_flight_gb(stored: Mapping[str, Any], wanted: Any) -> int:
  """The limit, in gigabytes, on the memory Orbax uses between files and devices.

  The largest shard of any array, in whole chunks, plus one gigabyte so that small arrays are read
  concurrently. Orbax's default is 96, and it rejects a shard above its limit.

  Args:
    stored: name -> Orbax's metadata of the stored array.
    wanted: the arrays as jax.ShapeDtypeStruct, with shardings.
  """
  def chunk_aligned_bytes(there, leaf) -> int:
    chunks = there.storage.chunk_shape if there.storage else there.shape
    sides = (min(whole, (math.ceil(part / chunk) + 1) * chunk) for whole, part, chunk in zip(
        leaf.shape, leaf.sharding.shard_shape(leaf.shape), chunks, strict=True))
    return math.prod(sides) * max(np.dtype(there.dtype).itemsize, np.dtype(leaf.dtype).itemsize)

  largest = max(chunk_aligned_bytes(stored[_name_of(path)], leaf)
                for path, leaf in jax.tree_util.tree_leaves_with_path(wanted))
  return 1 + math.ceil(largest / 10**9)


def _name_of(path) -> str:
  return jax.tree_util.keystr(path, simple=True, separator="/")


def require_version(directory: epath.Path, meta: Mapping[str, Any]) -> None:
  """Raises CheckpointError for a checkpoint of another format version."""
  version = meta.get("format_version")
  if version != FORMAT_VERSION:
    raise CheckpointError(f"{directory} has format version {version}, this code reads "
                          f"{FORMAT_VERSION}: use the code that wrote it")


def require_same_arrays(directory: epath.Path, item: str, wanted: Any, cast: bool = False
                        ) -> dict[str, Any]:
  """Checks that an item has the `wanted` arrays; returns name -> Orbax's metadata of each.

  Args:
    directory: of one step.
    item: name of the Orbax item.
    wanted: the arrays as jax.ShapeDtypeStruct.
    cast: whether floats may differ in dtype.

  Raises:
    CheckpointError: names the first array that differs in name, dtype or shape.
  """
  if not (directory / item).exists():
    raise CheckpointError(f"{directory} does not fit: it has no {item}")
  stored = ocp.PyTreeCheckpointHandler().metadata(directory / item).tree
  there, here = ({_name_of(path): leaf
                  for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
                 for tree in (stored, wanted))
  for name in sorted(there.keys() | here.keys()):
    if not _fits(there.get(name), here.get(name), cast):
      raise CheckpointError(
          f"{directory} does not fit this configuration: {item}/{name} is "
          f"{_described(there.get(name))} there and {_described(here.get(name))} here")
  return there


def _fits(stored: Any, wanted: Any, cast: bool) -> bool:
  if stored is None or wanted is None or tuple(stored.shape) != tuple(wanted.shape):
    return False
  return np.dtype(stored.dtype) == np.dtype(wanted.dtype) or (
      cast and all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in (stored, wanted)))


def _described(leaf: Any) -> str:
  return "absent" if leaf is None else f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"
