"""A first grid: at equal N_total, how do sparsity and the number of experts affect the loss?

Six models of 0.7M parameters (excluding embedding and output head), half a minute of training each:

* s = n_exp / n_topk goes 2, 4, 8 at n_exp = 16: does sparsity hurt?
* n_exp goes 8, 16, 32 at s = 4, and 16, 32 at s = 8: do more experts hurt?

    make quickstart
or
    python -m launch.submit --config=experiments/quickstart.py --backend=local --parallel=2
    python -m moe_jax.evaluate --config=experiments/quickstart.py

Runs this short show that the pipeline works; they say nothing about the scaling law. To turn this
into a study, copy this file, raise N_TOTAL and steps, and tune the learning rate of each cell: the
optimum depends on sparsity.
"""

import dataclasses

from moe_jax import arch
from moe_jax.config import (
    Architecture,
    DataConfig,
    ExecutionConfig,
    ModelConfig,
    MoEConfig,
    RunConfig,
    TrainConfig,
)
from moe_jax.grid import Grid

N_TOTAL = 700_000
SHAPES = [(16, 8), (16, 4), (16, 2), (8, 2), (32, 8), (32, 4)]  # n_exp, n_topk

RECIPE = RunConfig(
    # The solver below keeps only the heads and the vocabulary, and replaces the rest.
    arch=Architecture(n_layers=2, d_model=108, d_expert=58, n_exp=16, n_topk=4, n_heads=2,
                      vocab_size=1024),
    moe=MoEConfig(capacity_factor=1.25, routing_group_tokens=512),
    model=ModelConfig(compute_dtype="float32"),  # bfloat16 matmuls are slow on CPUs
    data=DataConfig(corpus="sotu", tokenizer="bpe-1024", seq_len=128),
    train=TrainConfig(steps=240, batch_size=8, learning_rate=6e-3, warmup_steps=20,
                      schedule="wsd", decay_fraction=0.3),
    execution=ExecutionConfig(remat="dots", log_every=20, checkpoint_every=80),
)


def get_grid() -> Grid:
  """Returns the paper's comparison: at fixed depth and granularity, more experts mean less width.

  Each shape meets N_total to within half a percent; the exact residual is printed.
  """
  cells = []
  for n_exp, n_topk in SHAPES:
    shape = arch.solve(
        template=RECIPE.arch, n_total=N_TOTAL, n_exp=n_exp, n_topk=n_topk,
        n_layers=2, granularity=2.0,
        # TPUs prefer multiples of 128, but at this size those leave nothing to choose from.
        limits=arch.IsoLimits(d_model_multiple=4, d_expert_multiple=2))
    cells.append(dataclasses.replace(RECIPE, arch=shape.arch))
  return Grid("quickstart", RECIPE, tuple(cells), N_TOTAL)
