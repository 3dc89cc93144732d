"""AdamW with warm-up and decay; which parameters decay is decided here, by name."""

from typing import Any

import jax
import optax

from moe_jax.config import TrainConfig


def learning_rate_schedule(train: TrainConfig) -> optax.Schedule:
  """Step (counted from 0) -> learning rate.

  Warm-up rises linearly to the peak and its first step is not 0. `wsd` then stays there and
  falls linearly over the last `decay_fraction` of the steps (arXiv 2404.06395); `cosine` falls
  from the end of the warm-up on. The decay would reach its end value at step `steps`, one
  after the last, so no step is taken at a rate of 0.
  """
  peak, warmup = train.learning_rate, train.warmup_steps
  end = peak * train.final_learning_rate_fraction
  rise = optax.linear_schedule(peak / (warmup + 1), peak, max(warmup, 1))
  if train.schedule == "cosine":
    fall = optax.cosine_decay_schedule(peak, max(train.steps - warmup, 1),
                                       train.final_learning_rate_fraction)
    return optax.join_schedules([rise, fall], [warmup])
  decay = round(train.steps * train.decay_fraction)
  fall = optax.linear_schedule(peak, end, max(decay, 1))
  return optax.join_schedules([rise, optax.constant_schedule(peak), fall],
                              [warmup, train.steps - decay])


def decay_mask(params: Any) -> Any:
  """True for the parameters that decay: every matrix that multiplies activations (`w_*`).

  Norm scales and the embedding table do not: a table's rows are looked up, and decay would
  shrink the rows of rare tokens between their rare updates.
  """
  return jax.tree.map_with_path(lambda path, _: path[-1].key.startswith("w_"), params)


def make_optimizer(train: TrainConfig) -> optax.GradientTransformation:
  """Clip by global norm, Adam in float32, decoupled weight decay, learning rate."""
  return optax.chain(
      optax.clip_by_global_norm(train.clip_norm),
      optax.scale_by_adam(train.beta1, train.beta2, train.eps),
      optax.add_decayed_weights(train.weight_decay, decay_mask),
      optax.scale_by_learning_rate(learning_rate_schedule(train)))
