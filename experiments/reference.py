"""The reference cell for speed and memory: a fine-grained MoE of a size others report speeds for.

    python -m moe_jax.plan --config=experiments/reference.py --topology=v5p-64

16 layers, width 1024, 64 experts of width 512, top-8, sequence length 2048, 8 sequences per chip
on 32 chips. It answers no scientific question; it is a benchmark for speed and memory.
"""

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
from moe_jax.grid import Grid

RECIPE = RunConfig(
    arch=Architecture(n_layers=16, d_model=1024, d_expert=512, n_exp=64, n_topk=8, n_heads=8,
                      vocab_size=50304),
    moe=MoEConfig(capacity_factor=1.25),
    model=ModelConfig(compute_dtype="bfloat16"),
    data=DataConfig(corpus="sotu", tokenizer="bpe-4096", seq_len=2048),
    train=TrainConfig(steps=10_000, batch_size=256, learning_rate=1e-3, warmup_steps=200),
    execution=ExecutionConfig(mesh=MeshConfig(fsdp=4, expert=8), remat="rows"),
)


def get_grid() -> Grid:
  return Grid("reference", RECIPE, (RECIPE,))
