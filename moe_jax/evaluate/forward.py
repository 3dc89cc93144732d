"""Forward passes for evaluation: at the capacity of training, and with nothing dropped."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from moe_jax.config import MeshConfig, RunConfig, TrainConfig, resolve_mesh
from moe_jax.data.loader import Batch
from moe_jax.errors import FieldError
from moe_jax.fields import override
from moe_jax.mesh import batch_sharding, mesh_size, platform_of, replicated
from moe_jax.model import functional, observed
from moe_jax.model.cross_entropy import token_scores
from moe_jax.moe.router import RouterSums


class Output(NamedTuple):
  """The result of a forward pass, on the host.

  Attributes:
    nll_BS: float32, loss of each target in nats.
    sums: router sums by layer, padding excluded; None if every layer is dense.
    choices: the routing of each token; None in a dropless pass, if every layer is dense, or if
      experts choose tokens.
  """

  nll_BS: np.ndarray
  sums: RouterSums | None
  choices: observed.Choices | None = None

  @property
  def dropped(self) -> float:
    return 0.0 if self.sums is None else float(self.sums.dropped.sum())


def evaluation_config(config: RunConfig, n_devices: int) -> RunConfig:
  """Returns `config` with a batch size and a mesh for evaluation on this many devices.

  Each device gets whole routing groups. The batch is about as large as a microbatch of training,
  which is known to fit. The devices may differ from those of training: a mesh that does not suit
  them is replaced by one with all of them on `data`.
  """
  unit = n_devices * config.group_sequences
  wanted = config.train.batch_size // config.execution.microbatches
  config = dataclasses.replace(
      config,
      train=dataclasses.replace(config.train,
                                batch_size=max(1, round(wanted / unit)) * unit),
      execution=dataclasses.replace(config.execution, microbatches=1))
  try:
    resolve_mesh(config, n_devices)
  except FieldError:
    return dataclasses.replace(config, execution=dataclasses.replace(
        config.execution, mesh=MeshConfig(n_devices, 1, 1)))
  return config


# Bytes per device for the rows of all experts, each with a slot for every token.
_SLOT_BYTES = 2**30


def dropping_nothing(config: RunConfig, platform: str, n_devices: int) -> RunConfig:
  """Returns `config` with a dispatch that drops nothing on these devices, and a batch to suit it.

  On a GPU, the float32 products of the dropless dispatch are a sequential loop over blocks of
  rows: thousands of small kernels where experts are small. The bfloat16 products use our own
  kernels, which have not been validated on a device. So on a GPU each expert instead gets a slot
  for every token of a sequence, most of them empty. That is n_exp / n_topk times the work, but one
  product, for as many sequences at a time as fit into memory.
  """
  if platform != "gpu":
    return override(config, {"moe.dispatch": "dropless"})
  arch, here = config.arch, config.train.batch_size // n_devices
  itemsize = np.dtype(config.model.compute_dtype).itemsize
  most = _SLOT_BYTES // (arch.n_exp * config.data.seq_len * arch.d_model * itemsize)
  rows = max(n for n in range(1, here + 1) if here % n == 0 and n <= max(most, 1))
  return override(config, {
      "moe.dispatch": "capacity", "moe.capacity_factor": float(arch.n_exp),
      "moe.routing_group_tokens": 0, "train.batch_size": rows * n_devices})


class Forward:
  """The forward passes of one model."""

  def __init__(self, config: RunConfig, mesh: Mesh, params: functional.Params,
               router: functional.Router | None = None):
    """`config` is from evaluation_config; each pass is compiled on first use."""
    self._mesh, self._params, self._router = mesh, params, router
    self._config = config

  def at_capacity(self, batch: Batch) -> Output:
    """Runs with the capacity and routing groups of training; the output includes the choices."""
    return self._run(self._config, batch, self._config.arch.n_moe_layers > 0
                     and self._config.moe.causal)

  def dropless(self, batch: Batch) -> Output:
    """Runs with every token at all of its experts, whatever the dispatch in training."""
    return self._run_in_parts(dropping_nothing(
        self._config, platform_of(self._mesh), mesh_size(self._mesh)), batch)

  def _run_in_parts(self, config: RunConfig, batch: Batch) -> Output:
    rows = config.train.batch_size
    parts = [self._run(config, {name: x[first:first + rows] for name, x in batch.items()}, False)
             for first in range(0, len(batch["inputs_BS"]), rows)]
    return Output(np.concatenate([part.nll_BS for part in parts]),
                  jax.tree.map(lambda *sums: sum(sums), *[part.sums for part in parts]))

  def _run(self, config: RunConfig, batch: Batch, observe: bool) -> Output:
    # Checkpoints of one run, and runs that differ only in seed or optimizer, share a program.
    config = dataclasses.replace(config, seed_init=0, seed_data=0, train=TrainConfig(
        batch_size=config.train.batch_size))
    batch = jax.device_put(batch, batch_sharding(self._mesh))
    program = _program(config, self._mesh, observe)
    return Output(*jax.device_get(program(self._params, self._router, batch)))


@functools.lru_cache(maxsize=4)
def _program(config: RunConfig, mesh: Mesh, observe: bool):
  """Compiles (params, router, batch) -> fields of Output, with the choices if `observe`."""

  def step(params, router, batch):
    model = functional.merged(config, params, router)
    features = functools.partial(observed.features, model) if observe else model.features
    x_BSD, head_DV, *rest = features(batch["inputs_BS"], batch["segments_BS"], mesh,
                                     counted_BS=batch["mask_BS"])
    nll_BS, _ = token_scores(x_BSD, head_DV, batch["targets_BS"], mesh)
    return nll_BS, *rest

  return jax.jit(step, out_shardings=replicated(mesh))
