"""AdamW with a learning rate schedule, and weight decay for parameters chosen by name."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from moe_jax.config import TrainConfig
from moe_jax.train.hyperparams import OptimizerHyperparams


def learning_rate_schedule(train: TrainConfig,
                           hyperparams: OptimizerHyperparams | None = None) -> optax.Schedule:
  """Returns the schedule: step (counted from 0) -> learning rate.

  The warm-up is linear, and its first step is not 0. `wsd` then stays at the peak and decays
  linearly over the last `decay_fraction` of the steps (arXiv 2404.06395); `cosine` decays
  from the end of the warm-up. The decay would reach its end value at step `steps`, one
  past the last, so no step is taken at a rate of 0.

  Args:
    train: selects the schedule.
    hyperparams: its numbers, if they are arguments of a compiled step; None takes those of
      `train`.
  """
  peak, end, warmup, begin, length, _ = hyperparams or OptimizerHyperparams.of(train)

  def schedule(step):
    rise = jnp.minimum((step + 1) / (warmup + 1), 1)
    left = 1 - jnp.clip((step - begin) / length, 0, 1)
    if train.schedule == "cosine":
      left = (1 - jnp.cos(jnp.pi * left)) / 2
    return rise * (end + (peak - end) * left)

  return schedule


def decay_mask(params: Any) -> Any:
  """True for the parameters with weight decay: every matrix that multiplies activations (`w_*`).

  Norm scales and the embedding table have none: decay would shrink the rows of rare tokens between
  their rare updates. So with tie_embeddings the output head, which is the same table, has no
  weight decay; a separate head has.
  """
  return jax.tree.map_with_path(lambda path, _: path[-1].key.startswith("w_"), params)


def make_optimizer(train: TrainConfig,
                   hyperparams: OptimizerHyperparams | None = None) -> optax.GradientTransformation:
  """Clipping by global norm, Adam in float32, decoupled weight decay and the schedule.

  Args:
    train: of the run.
    hyperparams: as for learning_rate_schedule.
  """
  hyperparams = hyperparams or OptimizerHyperparams.of(train)
  return optax.chain(
      optax.clip_by_global_norm(train.clip_norm),
      optax.scale_by_adam(train.beta1, train.beta2, train.eps),
      optax.add_decayed_weights(hyperparams.weight_decay, decay_mask),
      optax.scale_by_learning_rate(learning_rate_schedule(train, hyperparams)))
