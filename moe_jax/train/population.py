"""Trains several runs of one shape as one: stacked states, and one compiled step for all.

Every array of the state, the batch and the metrics has a leading member axis; the step is
`train_step` under `jax.vmap`, or on a CPU in a loop over members. So each member computes what it
would compute alone, up to rounding due to the order of sums, and a non-finite value never
spreads to other members. A population of one is the plain step, bit for bit.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from moe_jax.config import RunConfig
from moe_jax.errors import require
from moe_jax.mesh import mesh_size, platform_of, replicated
from moe_jax.population import shape_of
from moe_jax.train import step as step_lib
from moe_jax.train.hyperparams import Hyperparams
from moe_jax.train.step import Batch, Metrics, State


def require_mesh(n_members: int, mesh: Mesh) -> None:
  """Raises FieldError if a population would have to be split over devices."""
  require(n_members == 1 or mesh_size(mesh) == 1, "config.execution.population", n_members,
          f"trains on one device, and the mesh has {mesh_size(mesh)}: make only one visible to the "
          "process (CUDA_VISIBLE_DEVICES=0, for instance), or train cells alone with "
          "--config.execution.population=1")


@functools.lru_cache(maxsize=4)
def compiled_step(shape: RunConfig, mesh: Mesh, n_members: int) -> jax.stages.Compiled:
  """Compiles the step of `n_members` runs of a shape (shape_of).

  It takes their states, batches and hyperparameters, and donates the states.
  """
  if n_members == 1:
    return step_lib.lower_train_step(shape, mesh).compile()

  def step(state, batch, hyperparams):
    return step_lib.train_step(state, batch, hyperparams, shape, mesh)

  each = (step_lib.abstract_state(shape, mesh), step_lib.abstract_batch(shape, mesh),
          Hyperparams.of(shape))
  together = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(
      (n_members, *leaf.shape), leaf.dtype, sharding=replicated(mesh)), each)
  all_steps = jax.vmap(step)
  if platform_of(mesh) == "cpu":  # there a loop is faster than vmap
    all_steps = functools.partial(_one_after_another, step)
  return jax.jit(all_steps, donate_argnums=0,
                 out_shardings=replicated(mesh)).lower(*together).compile()


def _one_after_another(step, *together):
  return jax.lax.map(lambda each: step(*each), together)


class Population:
  """The compiled step of several runs, and conversions between one run's state and all."""

  def __init__(self, configs: Sequence[RunConfig], mesh: Mesh):
    """`configs` must have the same shape (moe_jax.population.require_one_shape)."""
    self._config, self._mesh, self._n = configs[0], mesh, len(configs)
    self._compiled = compiled_step(shape_of(self._config), mesh, self._n)
    each = [Hyperparams.of(config) for config in configs]
    self._hyperparams = jax.device_put(
        each[0] if self._n == 1 else jax.tree.map(lambda *values: np.stack(values), *each),
        replicated(mesh))
    here = replicated(mesh)
    self._stack = jax.jit(lambda *states: jax.tree.map(lambda *x: jnp.stack(x), *states),
                          out_shardings=here)
    self._take = jax.jit(lambda state, i: jax.tree.map(
        lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), state), out_shardings=here)

  def step(self, state: State, batch: Batch) -> tuple[State, Metrics]:
    """Takes one step of every member. `state` is donated."""
    return self._compiled(state, batch, self._hyperparams)

  def join(self, states: Sequence[State]) -> State:
    """Stacks the members' states."""
    return states[0] if self._n == 1 else self._stack(*states)

  def state_of(self, state: State, i: int) -> State:
    """A copy of member i's state, without the member axis; for a population of one, `state`."""
    return state if self._n == 1 else self._take(state, np.int32(i))

  def put_batch(self, batches: Sequence[dict[str, Any]]) -> Batch:
    """Stacks the members' batches (`inputs_BS`, ...) and puts them on the device."""
    if self._n == 1:
      return step_lib.put_batch(batches[0], self._config, self._mesh)
    shape = step_lib.abstract_batch(self._config, self._mesh)["inputs"].shape
    return {name.removesuffix("_BS"): jax.device_put(
        np.stack([batch[name].reshape(shape) for batch in batches]), replicated(self._mesh))
        for name in batches[0]}

  def values(self, metrics: Metrics) -> list[dict[str, float]]:
    """Returns each member's metrics as floats; waits for them."""
    fetched = jax.device_get(metrics)
    if self._n == 1:
      return [{name: float(value) for name, value in fetched.items()}]
    return [{name: float(value_P[i]) for name, value_P in fetched.items()}
            for i in range(self._n)]
