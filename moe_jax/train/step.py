"""The training step as a pure function of a plain nested dict, and its compilation."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from moe_jax.config import RunConfig
from moe_jax.mesh import batch_sharding, local_rows, platform_of, replicated
from moe_jax.model import functional
from moe_jax.model.cross_entropy import summed_nll
from moe_jax.moe.router import (
    RouterSums,
    balance_loss,
    balanced_bias,
    router_metrics,
    z_loss,
)
from moe_jax.population import shape_of
from moe_jax.train.hyperparams import Hyperparams
from moe_jax.train.optimizer import learning_rate_schedule, make_optimizer

# {"params", "mu", "nu": trees of the same structure; "router": the routers' state beside their
# parameters; "step": steps taken}. A checkpoint has the same entries under these names.
State = dict[str, Any]
Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]

# XLA:TPU options, off by default, that overlap the experts' all-to-alls with their products.
TPU_OPTIONS = {"xla_tpu_enable_async_all_to_all": True,
               "xla_tpu_enable_async_ragged_all_to_all": True}

_NOISE = 0x6A697474  # separates the random keys of the jitter from those of the initial weights


def abstract_state(config: RunConfig, mesh: Mesh) -> State:
  """The state as ShapeDtypeStructs; moments are sharded like their parameters."""
  model = functional.abstract_model(config, mesh)
  return {**model, "mu": model["params"], "nu": model["params"],
          "step": jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(mesh))}


def init_state(config: RunConfig, mesh: Mesh) -> State:
  """Initializes the state; it depends on `seed_init`, but not on the mesh."""
  abstract = abstract_state(config, mesh)
  made_zero = {name: abstract[name] for name in ("mu", "nu", "step")}
  zeros = jax.jit(
      lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), made_zero),
      out_shardings=jax.tree.map(lambda leaf: leaf.sharding, made_zero))
  return {"params": functional.init_params(config, mesh),
          "router": functional.init_router(config, mesh), **zeros()}


def abstract_batch(config: RunConfig, mesh: Mesh) -> Batch:
  """int32 [microbatches, sequences, tokens], each microbatch split over the whole mesh."""
  n_micro = config.execution.microbatches
  shape = (n_micro, config.train.batch_size // n_micro, config.data.seq_len)
  leaf = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=batch_sharding(mesh, axis=1))
  return dict.fromkeys(("inputs", "targets", "segments"), leaf)


def rows_to_read(config: RunConfig, mesh: Mesh) -> np.ndarray:
  """Sorted indices of the rows of each global batch that this process reads, for its devices."""
  leaf = abstract_batch(config, mesh)["inputs"]
  n_micro, rows, _ = leaf.shape
  mine = local_rows(leaf.sharding, leaf.shape, axis=1)
  return (np.arange(n_micro)[:, None] * rows + mine).reshape(-1)


def put_batch(batch: dict[str, Any], config: RunConfig, mesh: Mesh) -> Batch:
  """Puts this process's rows of a batch (`inputs_BS`, ...) on its devices, as microbatches.

  Args:
    batch: int32 [rows, tokens], the rows in the order of rows_to_read; with one process, all.
    config: the run's configuration.
    mesh: where it runs.
  """

  def put(rows_BS, leaf):
    mine = local_rows(leaf.sharding, leaf.shape, axis=1)
    rows_MBS = rows_BS.reshape(leaf.shape[0], len(mine), leaf.shape[2])

    def of_device(index):  # a device's rows are consecutive, globally and in `mine`
      first, last, _ = index[1].indices(leaf.shape[1])
      start = np.searchsorted(mine, first)
      return rows_MBS[:, start:start + last - first]

    return jax.make_array_from_callback(leaf.shape, leaf.sharding, of_device)

  return {name: put(batch[name + "_BS"], leaf)
          for name, leaf in abstract_batch(config, mesh).items()}


def batch_loss(params: functional.Params, batch: Batch, config: RunConfig, mesh: Mesh,
               router: functional.Router | None = None, step: jax.Array | None = None,
               hyperparams: Hyperparams | None = None
               ) -> tuple[jax.Array, tuple[Metrics, RouterSums | None]]:
  """Mean loss over the global batch in nats per token, including the router's losses.

  The total is cross-entropy + balance_coef * sum over layers of the balance loss
  + z_coef * sum over layers of the z-loss. It is returned with metrics and the router's sums by
  layer (None if every layer is dense). `step` seeds the router's jitter; None means no jitter.
  `hyperparams` default to those of `config`.

  Several microbatches are rematerialized parts of one function: the forward pass first runs over
  all of them, because the balance loss multiplies two sums over the global batch, and the backward
  pass recomputes them one by one. So the loss and its gradient are those of the undivided batch,
  whereas accumulating gradients of per-microbatch balance losses would train a different model.
  """

  hyperparams = hyperparams or Hyperparams.of(config)

  def run(batch_BS, noise_key_B):
    model = functional.merged(config, params, router)
    x_BSD, head_DV, sums = model.features(batch_BS["inputs"], batch_BS["segments"], mesh,
                                          config.execution.remat, noise_key_B=noise_key_B)
    with jax.named_scope("loss"):
      nll = summed_nll(x_BSD, head_DV, batch_BS["targets"], mesh)
    return nll, sums

  parts = batch, None if step is None else _noise_keys(config, hyperparams.seed_init, step)
  if config.execution.microbatches == 1:
    nll, sums = run(*jax.tree.map(lambda x_MB: x_MB[0], parts))
  else:
    run = jax.checkpoint(run, prevent_cse=False)
    parts = jax.lax.map(lambda part: run(*part), parts)
    nll, sums = jax.tree.map(lambda x: x.sum(0), parts)

  total, metrics = _with_router_losses(nll / config.batch_tokens, sums, hyperparams)
  return total, (metrics, sums)


def _noise_keys(config: RunConfig, seed_init: jax.Array, step: jax.Array) -> jax.Array | None:
  """key_MB: a key for each row of the global batch, from `seed_init` and `step`.

  So a row's noise does not depend on the mesh, the microbatches or whether the run was resumed.
  """
  if not config.moe.jitter:
    return None
  key = jax.random.fold_in(jax.random.key(seed_init), _NOISE)
  row_MB = jnp.arange(config.train.batch_size).reshape(config.execution.microbatches, -1)
  return jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (None, 0))(
      jax.random.fold_in(key, step), row_MB)


def _with_router_losses(loss: jax.Array, sums: RouterSums | None,
                        hyperparams: Hyperparams) -> tuple[jax.Array, Metrics]:
  if sums is None:  # every layer is dense
    return loss, {"loss": loss}
  balance_L, z_L = balance_loss(sums), z_loss(sums)
  total = loss + hyperparams.balance_weight * balance_L.sum() + hyperparams.z_weight * z_L.sum()
  return total, {"loss": loss, "balance_loss": balance_L.mean(), "z_loss": z_L.mean(),
                 **router_metrics(sums)}


def train_step(state: State, batch: Batch, hyperparams: Hyperparams, config: RunConfig,
               mesh: Mesh) -> tuple[State, Metrics]:
  """Takes one optimizer step. Metrics are scalars of the global batch, before the update.

  `hyperparams` take precedence over `config`, which may have placeholders (population.shape_of).
  """
  optimizer = make_optimizer(config.train, hyperparams.optimizer)
  params, router = state["params"], state["router"]
  (_, (metrics, sums)), grads = jax.value_and_grad(batch_loss, has_aux=True)(
      params, batch, config, mesh, router, state["step"], hyperparams)
  opt_state = optax.tree.set(optimizer.init(params), mu=state["mu"], nu=state["nu"],
                             count=state["step"])
  with jax.named_scope("optimizer"):
    updates, opt_state = optimizer.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
  metrics |= {"grad_norm": optax.tree.norm(grads),
              "learning_rate": learning_rate_schedule(config.train, hyperparams.optimizer)(
                  state["step"])}
  router = jax.tree.map(lambda bias_LE: balanced_bias(
      bias_LE, sums.assigned_E, hyperparams.bias_update_rate), router)
  return {"params": params, "router": router,
          "mu": optax.tree.get(opt_state, "mu"), "nu": optax.tree.get(opt_state, "nu"),
          "step": state["step"] + 1}, metrics


def lower_train_step(config: RunConfig, mesh: Mesh) -> jax.stages.Lowered:
  """Lowers the step for a mesh, whose devices need not be present.

  The step takes state, batch and hyperparameters, and donates the state. `moe_jax.plan` compiles
  this same program.
  """
  shape, state = shape_of(config), abstract_state(config, mesh)
  hyperparams = jax.tree.map(lambda number: jax.ShapeDtypeStruct(
      (), number.dtype, sharding=replicated(mesh)), Hyperparams.of(config))
  shardings = jax.tree.map(lambda leaf: leaf.sharding, state)

  def step(state, batch, hyperparams):
    return train_step(state, batch, hyperparams, shape, mesh)

  options = TPU_OPTIONS if platform_of(mesh) == "tpu" else None
  return jax.jit(step, donate_argnums=0, out_shardings=(shardings, replicated(mesh)),
                 compiler_options=options).lower(state, abstract_batch(config, mesh), hyperparams)


def compile_train_step(config: RunConfig, mesh: Mesh) -> Callable[[State, Batch],
                                                                  tuple[State, Metrics]]:
  """Compiles the step and binds the hyperparameters of `config`."""
  compiled = lower_train_step(config, mesh).compile()
  hyperparams = jax.device_put(Hyperparams.of(config), replicated(mesh))
  return lambda state, batch: compiled(state, batch, hyperparams)
