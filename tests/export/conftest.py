"""Small runs of each layout, exported: what the tests here look at and break."""

import dataclasses
import pathlib

import pytest

from moe_jax import run_dir as run_dir_lib
from moe_jax.data.prepare import prepare
from moe_jax.export.to_hf import export
from moe_jax.grid import Cell
from moe_jax.run_dir import RunDir
from moe_jax.train.checkpoint import Checkpointer
from tests.evaluate.conftest import STATUS, out, out_with_data, small_corpus  # noqa: F401
from tests.small import ARCH, random_params, small_config

ARCHS = {
    "qwen3_moe": dataclasses.replace(ARCH, n_heads=4, n_kv_heads=2, head_dim=8, n_layers=3,
                                     n_dense_layers=1, d_dense=20, d_expert=16,
                                     tie_embeddings=True),
    "olmoe": dataclasses.replace(ARCH, n_heads=4, n_kv_heads=2, qk_norm="projection"),
    "mixtral": dataclasses.replace(ARCH, n_heads=4, n_kv_heads=2, head_dim=6, d_expert=10,
                                   qk_norm="none")}
MOE = {"qwen3_moe": {}, "olmoe": {"norm_topk_prob": False}, "mixtral": {}}
MODEL = {"qwen3_moe": {"rope_theta": 50_000.0}, "olmoe": {"norm_eps": 1e-5},
         "mixtral": {"rope_theta": 500.0}}


def config_of(layout, **changes):
  """A configuration that the layout expresses, unlike its class's defaults."""
  return small_config(dataclasses.replace(ARCHS[layout], **changes), data={"corpus": "small"},
                      moe={"dispatch": "dropless", **MOE[layout]},
                      model=MODEL[layout] | {"compute_dtype": "float32"})


def cell_of(layout):
  return Cell("kinds", f"kinds.py:{layout}", layout, config_of(layout))


def leave_run(out: pathlib.Path, cell: Cell, params=None) -> RunDir:  # noqa: F811
  """A finished run with random parameters."""
  run_dir = RunDir.of(out, cell)
  run_dir.claim(cell)
  params = random_params(cell.config) if params is None else params
  fingerprint = prepare(cell.config.data, out / "_data").fingerprint
  with Checkpointer(run_dir, keep=1) as checkpointer:
    checkpointer.save(4, {"params": params}, {}, {"data_fingerprint": fingerprint})
  run_dir.write_status({**STATUS, "state": run_dir_lib.FINISHED})
  return run_dir


@pytest.fixture(scope="session")
def exported(out_with_data):  # noqa: F811
  """<folder>/<layout> for each: exported runs, the last in one file, the others in several."""
  folder = out_with_data / "hf"
  for layout in ARCHS:
    leave_run(out_with_data, cell_of(layout))
    export(cell_of(layout), out_with_data, folder / layout,
           shard_bytes=4e9 if layout == "mixtral" else 20e3)
  return folder
