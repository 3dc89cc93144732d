"""Configurations small enough to compile in a second, for tests of every room."""

import dataclasses
from typing import Any

import numpy as np

from moe_jax.config import (
    Architecture,
    DataConfig,
    ExecutionConfig,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    RunConfig,
    TrainConfig,
)

ARCH = Architecture(n_layers=2, d_model=16, d_expert=12, n_exp=8, n_topk=2, n_heads=2)

# Eight ways to lay eight devices out.
MESHES = {
    "data8": MeshConfig(8, 1, 1), "fsdp8": MeshConfig(1, 8, 1), "expert8": MeshConfig(1, 1, 8),
    "data4_fsdp2": MeshConfig(4, 2, 1), "data4_expert2": MeshConfig(4, 1, 2),
    "fsdp2_expert4": MeshConfig(1, 2, 4), "fsdp4_expert2": MeshConfig(1, 4, 2),
    "data2_fsdp2_expert2": MeshConfig(2, 2, 2),
}
ONE_DEVICE = MeshConfig(1, 1, 1)


def small_config(arch: Architecture = ARCH, **sections) -> RunConfig:
  """Float32, eight sequences of 16 tokens; `moe={...}` and so on change single fields."""
  defaults = {
      "moe": MoEConfig(norm_topk_prob=arch.n_topk > 1),
      "model": ModelConfig(compute_dtype="float32"),
      "data": DataConfig(seq_len=16),
      "train": TrainConfig(steps=4, batch_size=8, warmup_steps=1),
      "execution": ExecutionConfig(mesh=ONE_DEVICE),
  }
  seeds = {name: sections.pop(name) for name in ("seed_init", "seed_data") if name in sections}
  changed = {name: dataclasses.replace(default, **sections.pop(name, {}))
             for name, default in defaults.items()}
  assert not sections, f"unknown sections {sections}"
  return RunConfig(arch=arch, **changed, **seeds)


def random_params(config: RunConfig, seed: int = 0) -> dict[str, Any]:
  """Parameters in NumPy, without compiling anything; norm scales differ from 1."""
  import jax

  from moe_jax.mesh import make_mesh
  from moe_jax.model import functional
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    if "norm" in path[-1].key:
      return rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
    scale = 1.0 if "router" in path[-1].key else 0.25
    return rng.normal(0, scale, leaf.shape).astype(np.float32)

  one = dataclasses.replace(config, execution=ExecutionConfig(mesh=ONE_DEVICE))
  return jax.tree.map_with_path(draw, functional.abstract_params(
      one, make_mesh(one, jax.devices()[:1])))
