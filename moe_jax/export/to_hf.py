"""Exports a checkpoint as a Hugging Face directory, chunk by chunk."""

import collections
import dataclasses
import json
import os
import pathlib
import shutil
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from moe_jax import config as config_lib
from moe_jax.config import ExecutionConfig
from moe_jax.data.prepare import prepare
from moe_jax.errors import FieldError, require
from moe_jax.export import layouts, tokenizer_files
from moe_jax.export import shards as shards_lib
from moe_jax.export.layouts import Weight
from moe_jax.export.shards import DTYPES, Shards
from moe_jax.files import is_local
from moe_jax.grid import Cell
from moe_jax.mesh import make_mesh
from moe_jax.model.functional import abstract_params
from moe_jax.run_dir import RunDir
from moe_jax.train.checkpoint_files import content_hash
from moe_jax.train.checkpoint_parts import StoredParams

ORIGIN = "moe_jax.json"  # records which run was exported


class Exported(NamedTuple):
  """Summary of an export."""

  layout: str
  step: int
  n_parameters: int
  n_bytes: int
  n_files: int


def export(cell: Cell, out: str | os.PathLike, hf: str | os.PathLike, step: int | None = None,
           layout: str | None = None, dtype: str = "float32", shard_bytes: float = 4e9
           ) -> Exported:
  """Writes the directory `hf` atomically: it appears only once it is complete.

  Only one chunk of the checkpoint, at most 64 MB, is in memory at a time, whatever the file size.

  Args:
    cell: the cell whose run is exported.
    out: root directory of all experiments.
    hf: a local path that does not exist yet.
    step: step of the checkpoint; None means the newest sound one.
    layout: a key of layouts.LAYOUTS; None selects the one that fits the architecture.
    dtype: float32, which keeps the weights as they were trained, or bfloat16.
    shard_bytes: maximum size of a weight file, unless a single tensor is larger.

  Raises:
    FieldError: the run does not exist, the layout cannot express the architecture, the directory
      exists or does not fit on the disk, or the text or its tokenizer has changed since the run
      read it.
    CheckpointError: there is no such checkpoint, or none is sound.
  """
  config, target = cell.config, _free_target(hf)
  found = layouts.layout_of(config, layout)
  require(dtype in DTYPES, "dtype", dtype, f"must be {' or '.join(DTYPES)}")
  run_dir = RunDir.of(out, cell)
  require(run_dir.check_identity(cell), "out", os.fspath(out), f"holds no run {cell.experiment}/"
          f"{cell.name}")
  mesh = make_mesh(dataclasses.replace(config, execution=ExecutionConfig()), jax.devices()[:1])
  stored = StoredParams(run_dir, abstract_params(config, mesh), step)
  prepared = prepare(config.data, epath.Path(out) / "_data")
  require(stored.meta["data_fingerprint"] == prepared.fingerprint, "config.data.corpus",
          config.data.corpus, "the text has changed since the run read it, and perhaps its "
          "tokenizer")
  weights = tuple(layouts.weights(config.arch, found))
  planned = shards_lib.plan(weights, DTYPES[dtype].itemsize, shard_bytes)
  _require_space(target, sum(weight.size for weight in weights) * DTYPES[dtype].itemsize)
  partial = target.with_name(f".{target.name}.partial")
  shutil.rmtree(partial, ignore_errors=True)  # left by an interrupted export
  partial.mkdir(parents=True)
  shards = Shards(partial, planned, dtype)
  write_weights(shards, stored, weights)
  tokenizer_files.write(partial, prepared.tokenizer, config.data.seq_len)
  start = prepared.document_start_id
  _write_json(partial / "config.json", layouts.config_json(config, found, dtype, start))
  _write_json(partial / "generation_config.json",
              {"bos_token_id": start, "eos_token_id": start, "pad_token_id": start})
  _write_json(partial / ORIGIN, {
      "run": f"{cell.experiment}/{cell.name}", "step": stored.step,
      "identity": config_lib.identity_hash(config),
      "checkpoint": content_hash(run_dir, stored.step), "config": config_lib.to_dict(config)})
  partial.rename(target)
  return Exported(found.name, stored.step, sum(weight.size for weight in weights), shards.n_bytes,
                  len(planned))


def write_weights(shards: Shards, stored: StoredParams, weights: Iterable[Weight]) -> None:
  """Fills the files one checkpoint chunk at a time; each chunk is read once."""
  arrays: dict[tuple[str, ...], dict[tuple[int, ...], Weight]] = collections.defaultdict(dict)
  for weight in weights:
    arrays[weight.path][weight.index] = weight
  for path, parts in arrays.items():
    shape, stacked = stored.shapes[path], len(next(iter(parts)))  # layer and expert axes
    for where, values in stored.chunks(path):
      first = [part.start for part in where[:stacked]]
      for at in np.ndindex(values.shape[:stacked]):
        weight = parts[tuple(i + start for i, start in zip(at, first, strict=True))]
        tensor = weight.from_layout(shards.tensor(weight), shape[stacked:])
        tensor[where[stacked:]] = values[at]
      del values  # frees it before the next chunk is read


def _free_target(hf: str | os.PathLike) -> pathlib.Path:
  require(is_local(hf), "hf", os.fspath(hf), "must be a local path")
  target = pathlib.Path(hf).expanduser().absolute()
  require(not target.exists(), "hf", os.fspath(hf), "exists, and is not overwritten")
  existing = next(path for path in target.parents if path.exists())
  require(existing.is_dir() and os.access(existing, os.W_OK), "hf", os.fspath(hf),
          f"cannot be written: {existing} is not a directory writable by this user")
  return target


def _require_space(target: pathlib.Path, needed: int) -> None:
  existing = next(path for path in target.parents if path.exists())
  free = shutil.disk_usage(existing).free
  if needed > free:
    raise FieldError("hf", str(target), f"needs {needed / 1e9:.3g} GB, but only "
                     f"{free / 1e9:.3g} GB are free")


def _write_json(file: pathlib.Path, value: Any) -> None:
  file.write_text(json.dumps(value, indent=2) + "\n")
