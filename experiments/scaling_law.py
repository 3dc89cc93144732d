"""The paper's study for TPU pods: the effect of N_total, sparsity and the number of experts.

Sizes from 30M to 3B parameters, 32 to 256 experts, 2 to 16 of them active, the same tokens for
every cell: the range of arXiv 2601.08215. The paper's configurations and learning rates are not
public, so those here are ours: granularity near 2, d_model / n_layers near 64, four heads, no
shared expert. N_total is met to 0.5 % with widths that suit a TPU's tiles, which leaves
granularity between 1.55 and 2.29 and d_model / n_layers between 51 and 83, at some sizes
correlated with n_exp. Include both as variables of the fit, or constrain them more tightly than
N_total (as study/arms.py does).

    python -m moe_jax.plan --config=experiments/scaling_law.py --topology=v5p-16 --parallel=2
    python -m launch.submit --config=experiments/scaling_law.py ...

Planning takes about one core-minute per cell; if interrupted, the same command resumes. From 1B
parameters on, weights are sharded over 8 chips (`mesh.fsdp`), so the number of chips must be a
multiple of 8; the weights of smaller models are replicated on each chip.

9B tokens per cell are 17,166 steps; --config.train.tokens=20e9 sets another number. Before running
the grid, sweep the learning rate at its corners (the optimum falls with size and depends on
sparsity) and replace LEARNING_RATES with the result. Prepare the corpus by name with
`python -m moe_jax.data`.
"""

import dataclasses

from moe_jax import arch
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

TOKENS = 9_000_000_000
BATCH_SIZE, SEQ_LEN = 256, 2048

# N_total -> peak learning rate to start a sweep from.
LEARNING_RATES = {30_000_000: 3e-3, 100_000_000: 2e-3, 300_000_000: 1.4e-3,
                  1_000_000_000: 1e-3, 3_000_000_000: 7e-4}
# Smaller models fit on one chip of any kind with their gradients and moments. Sharded weights must
# be gathered, which is slower for shapes that are not multiples of a TPU's tiles.
FSDP = {1_000_000_000: 8, 3_000_000_000: 8}
EXPERTS = (32, 64, 128, 256)
TOPK = (2, 4, 8, 16)

RECIPE = RunConfig(
    arch=Architecture(n_layers=8, d_model=512, d_expert=256, n_exp=64, n_topk=8, n_heads=4,
                      vocab_size=50304),
    moe=MoEConfig(capacity_factor=1.25),
    model=ModelConfig(compute_dtype="bfloat16"),
    data=DataConfig(corpus="fineweb-edu", tokenizer="gpt2", seq_len=SEQ_LEN),
    train=TrainConfig(steps=TOKENS // (BATCH_SIZE * SEQ_LEN), batch_size=BATCH_SIZE,
                      learning_rate=1e-3, warmup_steps=500, schedule="wsd"),
    execution=ExecutionConfig(remat="full", log_every=50, checkpoint_every=1000),
)


def _limits(n_total: int) -> arch.IsoLimits:
  """Allows finer widths for small models: multiples that suit a TPU leave them too few choices."""
  fine = n_total < 1_000_000_000
  return arch.IsoLimits(d_model_multiple=8 if fine else 64, d_expert_multiple=4 if fine else 16,
                        max_shift=0.5)


def get_grid() -> Grid:
  """Every size with every pair of n_exp and n_topk: 80 cells."""
  pairs = [(n_exp, n_topk) for n_exp in EXPERTS for n_topk in TOPK]
  cells = []
  for n_total, learning_rate in LEARNING_RATES.items():
    for n_exp, n_topk in pairs:
      shape = arch.solve(template=RECIPE.arch, n_total=n_total, n_exp=n_exp, n_topk=n_topk,
                         aspect=64, granularity=2.0, limits=_limits(n_total))
      cells.append(dataclasses.replace(
          RECIPE, arch=shape.arch,
          train=dataclasses.replace(RECIPE.train, learning_rate=learning_rate),
          execution=dataclasses.replace(RECIPE.execution,
                                        mesh=MeshConfig(fsdp=FSDP.get(n_total, 1)))))
  return Grid("scaling_law", RECIPE, tuple(cells))
