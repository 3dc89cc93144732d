"""The hyperparameters that the compiled step takes as arguments.

So cells of one shape (moe_jax/population.py) that differ in them share one compiled step, and the
step of a population takes an array of each.
"""

from typing import NamedTuple

import jax
import numpy as np

from moe_jax.config import RunConfig, TrainConfig

Number = jax.Array | np.generic


class OptimizerHyperparams(NamedTuple):
  """Hyperparameters of the optimizer, float32; see optimizer.py.

  Attributes:
    peak: peak learning rate.
    end: learning rate at the end of the decay.
    warmup_steps: length of the warm-up.
    decay_begin: step, counted from 0, after which the learning rate falls.
    decay_steps: length of the decay, at least 1.
    weight_decay: decoupled weight decay.
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
  """Hyperparameters of a whole training step.

  Attributes:
    seed_init: int32; used by the step for the router's jitter.
    balance_weight, z_weight: weights of the router's losses.
    bias_update_rate: step size of the selection bias.
    optimizer: see OptimizerHyperparams.
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
