"""The hyperparameters of a run that its compiled step takes as arguments.

So cells of one shape (moe_jax/population.py) that differ in them share one compiled step, and one
that trains many cells together takes an array of each.
"""

from typing import NamedTuple

import jax
import numpy as np

from moe_jax.config import RunConfig, TrainConfig

Number = jax.Array | np.generic


class OptimizerHyperparams(NamedTuple):
  """Of the optimizer; see optimizer.py.

  Attributes:
    peak: of the learning rate.
    end: learning rate that the decay heads for.
    warmup_steps: float32.
    decay_begin: step after which the learning rate falls.
    decay_steps: float32, in which it falls, at least 1.
    weight_decay: decoupled.
  """

  peak: Number
  end: Number
  warmup_steps: Number
  decay_begin: Number
  decay_steps: Number
  weight_decay: Number

  @classmethod
  def of(cls, train: TrainConfig) -> "OptimizerHyperparams":
    begin = train.stable_steps if train.schedule == "wsd" else train.warmup_steps
    return cls(*map(np.float32, (
        train.learning_rate, train.learning_rate * train.final_learning_rate_fraction,
        train.warmup_steps, begin, max(train.steps - begin, 1), train.weight_decay)))


class Hyperparams(NamedTuple):
  """Of a whole step.

  Attributes:
    seed_init: int32; a step needs it for the router's jitter.
    balance_weight, z_weight: of the router's losses.
    bias_update_rate: how far the selection bias moves.
    optimizer: see there.
  """

  seed_init: Number
  balance_weight: Number
  z_weight: Number
  bias_update_rate: Number
  optimizer: OptimizerHyperparams

  @classmethod
  def of(cls, config: RunConfig) -> "Hyperparams":
    moe = config.moe
    return cls(np.int32(config.seed_init), np.float32(moe.balance_weight),
               np.float32(moe.z_weight), np.float32(moe.bias_update_rate),
               OptimizerHyperparams.of(config.train))
