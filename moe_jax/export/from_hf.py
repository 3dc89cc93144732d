"""Imports a Hugging Face directory as a run to evaluate or to initialize another run from.

The imported run has taken no steps: its only checkpoint is that of step 0 and holds parameters
without optimizer state. To train further, start a new run with --config.train.init_from.
"""

import collections
import os
import pathlib
import re
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from moe_jax import config as config_lib
from moe_jax import run_dir as run_dir_lib
from moe_jax.config import DataConfig, RunConfig, TrainConfig
from moe_jax.data import tokenizer as tokenizer_lib
from moe_jax.data.prepare import prepare
from moe_jax.errors import FieldError, require
from moe_jax.export import layouts, tokenizer_files
from moe_jax.export.layouts import Imported, Weight
from moe_jax.export.weights import Weights, read_json
from moe_jax.fields import leaves
from moe_jax.files import is_local
from moe_jax.grid import Cell, Grid, select
from moe_jax.mesh import make_mesh
from moe_jax.model import functional
from moe_jax.run_dir import RunDir
from moe_jax.study import write
from moe_jax.train.checkpoint import Checkpointer
from moe_jax.train.checkpoint_parts import tree_paths

_LONGEST = 2048  # upper bound of a new experiment's data.seq_len


class Source(NamedTuple):
  """A Hugging Face directory that `look` has validated.

  Attributes:
    directory: its path.
    said: its config.json, translated to this project's configuration.
    weights: reads its tensors.
    tensors: the name, shape and place in the parameters of each tensor.
    init_from: value of train.init_from that identifies these weights.
  """

  directory: pathlib.Path
  said: Imported
  weights: Weights
  tensors: tuple[Weight, ...]
  init_from: str


def look(hf: str | os.PathLike) -> Source:
  """Reads config.json and checks that the directory has exactly the tensors it implies.

  Raises:
    FieldError: names `hf`; the directory is incomplete or damaged, or this project cannot express
      its architecture.
  """
  directory = pathlib.Path(hf).expanduser()
  said = layouts.from_config_json(read_json(directory, "config.json"))
  weights, arch = Weights(directory), said.arch
  require(arch.n_dense_layers + arch.n_moe_layers * arch.n_exp <= weights.count, "hf",
          str(directory), f"has {weights.count} tensors, too few for the {arch.n_layers} layers "
          f"and {arch.n_exp} experts of its config.json")
  tensors = tuple(layouts.weights(arch, said.layout))
  weights.check(tensors)
  label = re.sub("[^a-z0-9]+", "-", directory.resolve().name.lower()).strip("-") or "model"
  return Source(directory, said, weights, tensors, f"hf/{label}-{weights.content_hash()}")


def as_experiment(source: Source, path: str | os.PathLike, out: str | os.PathLike,
                  corpus: str = DataConfig.corpus) -> Cell:
  """Writes an experiment file whose only cell is the model, and stores the model's tokenizer.

  Args:
    source: the model.
    path: path of the new file, experiments/NAME.py.
    out: root directory of all experiments; the tokenizer is stored in <out>/_data.
    corpus: corpus to evaluate the model on.

  Raises:
    FieldError: the path is taken, `out` is not local, or the tokenizer is missing or larger than
      the vocabulary.
  """
  write.check_free(path)
  require(is_local(out), "out", os.fspath(out), "must be a local path, under which the tokenizer "
          "is kept: copy its _data to the bucket then")
  said = source.said
  fits = tokenizer_files.read(source.directory)
  require(fits.vocab_size <= said.arch.vocab_size, "hf", str(source.directory),
          f"its tokenizer has {fits.vocab_size} tokens, its config.json a vocabulary of "
          f"{said.arch.vocab_size}")
  name = tokenizer_lib.add(source.directory / tokenizer_lib.FILE, pathlib.Path(out) / "_data")
  config = RunConfig(
      arch=said.arch, moe=said.moe, model=said.model,
      data=DataConfig(corpus=corpus, tokenizer=name,
                      seq_len=min(said.max_positions or _LONGEST, _LONGEST)),
      train=TrainConfig(init_from=source.init_from))
  experiment = re.sub("[^a-z0-9._-]+", "-", pathlib.Path(path).stem.lower()).strip("-")
  grid = Grid(experiment, config, (config,))
  write.write_experiment(path, grid, f"The model of {source.directory.resolve().name}, imported "
                         "from Hugging Face's layout.\n\nIts weights are "
                         f"{source.init_from}; they are trained on by a cell that says\n"
                         f'init_from="{experiment}/{grid.names[0]}".\n')
  return select(f"{path}:{grid.names[0]}")[0]


def as_cell(source: Source, spec: str, changes: Mapping[str, Any]) -> Cell:
  """Returns the cell that `--config` selects, with train.init_from set to these weights.

  Raises:
    FieldError: several cells are selected, or the cell differs from the model; names the fields.
  """
  (cell, *others) = select(spec, {**changes, "train.init_from": source.init_from})
  require(not others, "config", spec, "selects several cells: add :CELL")
  differing = differences(cell.config, source.said)
  require(not differing, "hf", str(source.directory), f"does not fit {cell.selector}: "
          + "; ".join(differing))
  return cell


def differences(config: RunConfig, said: Imported) -> list[str]:
  """Describes each field that makes the forward pass of `config` differ from the model's."""
  def resolved(arch):
    given = {f"arch.{name}": value for name, value in leaves(arch).items()}
    return given | {"arch.n_kv_heads": arch.kv_heads, "arch.head_dim": arch.d_head,
                    "arch.d_dense": arch.dense_width if arch.n_dense_layers else None}

  here, there = resolved(config.arch), resolved(said.arch)
  here |= {"moe.router": config.moe.router, "moe.norm_topk_prob": config.moe.norm_topk_prob,
           "model.rope_theta": config.model.rope_theta, "model.norm_eps": config.model.norm_eps}
  there |= {"moe.router": said.moe.router, "moe.norm_topk_prob": said.moe.norm_topk_prob,
            "model.rope_theta": said.model.rope_theta, "model.norm_eps": said.model.norm_eps}
  return [f"{path} is {here[path]!r} in the cell and {there[path]!r} in config.json"
          for path in here if here[path] != there[path]]


def import_weights(source: Source, cell: Cell, out: str | os.PathLike) -> RunDir:
  """Creates the run of a cell, with these weights as its checkpoint of step 0.

  Raises:
    FieldError: the cell's tokenizer is not the model's, or the run is already finished or has
      another identity.
  """
  config, run_dir = cell.config, RunDir.of(out, cell)
  begun = run_dir.check_identity(cell)  # the identity includes init_from: safe to resume
  require(not begun or run_dir.read_status().get("state") != run_dir_lib.FINISHED, "out",
          str(run_dir.path), "already exists")
  try:
    prepared = prepare(config.data, epath.Path(out) / "_data")
    config.check_vocabulary(prepared.vocab_size)
    mesh = make_mesh(config)
  except FieldError as error:
    raise error if error.field == "out" else error.under("config") from None
  if (source.directory / tokenizer_lib.FILE).is_file():
    require(tokenizer_lib.same_ids(prepared.tokenizer, tokenizer_files.read(source.directory)),
            "config.data.tokenizer", config.data.tokenizer, "is not the tokenizer of "
            f"{source.directory}: it encodes text differently")
  with run_dir.lock():
    run_dir.claim(cell)
    with Checkpointer(run_dir, keep=1) as checkpointer:
      checkpointer.save(0, {"params": read_params(source, config, mesh)}, {}, {
          "data_fingerprint": prepared.fingerprint,
          "identity": config_lib.identity_hash(config)})
    run_dir.write_status({
        "state": run_dir_lib.FINISHED, "step": 0, "steps": config.train.steps, "attempt": 0,
        "started": time.time(), "error": None, "commit": None,
        "device_kind": mesh.devices.flat[0].device_kind, "n_devices": mesh.devices.size})
  return run_dir


def read_params(source: Source, config: RunConfig, mesh) -> functional.Params:
  """Reads the parameters onto the mesh.

  Each tensor of which this process's devices hold a part is read once. Host memory holds one
  parameter at a time, and only this process's shards of it.
  """
  tensors = collections.defaultdict(dict)
  for weight in source.tensors:
    tensors[weight.path][weight.index] = weight
  abstract = functional.abstract_params(config, mesh)

  def load(path, leaf):
    def bounds_of(index):
      return tuple(part.indices(size)[:2] for part, size in zip(index, leaf.shape, strict=True))

    parts = {  # one per distinct shard: replicas share it
        bounds: np.empty([end - start for start, end in bounds], np.float32)
        for bounds in map(bounds_of, leaf.sharding.addressable_devices_indices_map(
            leaf.shape).values())}
    for at, weight in tensors[path].items():
      wanted = [bounds for bounds in parts if all(
          start <= i < end for i, (start, end) in zip(at, bounds, strict=False))]
      if not wanted:
        continue
      inner = leaf.shape[len(at):]  # without the layer and expert axes
      tensor = weight.from_layout(source.weights.read(weight.name), inner)
      for bounds in wanted:
        here = tuple(i - start for i, (start, _) in zip(at, bounds, strict=False))
        parts[bounds][here] = tensor[tuple(slice(*bound) for bound in bounds[len(at):])]
    return jax.make_array_from_callback(leaf.shape, leaf.sharding,
                                        lambda index: parts[bounds_of(index)])

  loaded = {path: load(path, leaf) for path, leaf in tree_paths(abstract).items()}
  return jax.tree_util.tree_map_with_path(
      lambda path, _: loaded[tuple(key.key for key in path)], abstract)


