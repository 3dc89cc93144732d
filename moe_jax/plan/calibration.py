"""Compares measured training speeds with what the planner estimates for the same configuration.

No JAX here: the compiler runs in separate processes (cells.py).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from etils import epath

from moe_jax.arch import count
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
from moe_jax.errors import require
from moe_jax.plan import cells
from moe_jax.plan import topology as topology_lib
from moe_jax.run_dir import RunDir


@dataclasses.dataclass(frozen=True)
class Measured:
  """A measured training speed.

  Attributes:
    name: what ran.
    config: the configuration that is compiled here.
    topology: name of the slice, as gcloud has it.
    tokens_per_second: per chip.
    source: where the speed was published, and which parts of `config` are our guess.
    n_slices: number of equal slices.
  """

  name: str
  config: RunConfig
  topology: str
  tokens_per_second: float
  source: str
  n_slices: int = 1


def _mixtral(chips: int) -> RunConfig:
  """Mixtral 8x7B as MaxText's benchmark trains it: fixed capacity, fsdp over all chips."""
  return RunConfig(
      arch=Architecture(n_layers=32, d_model=4096, d_expert=14336, n_exp=8, n_topk=2, n_heads=32,
                        n_kv_heads=8, vocab_size=32000),
      moe=MoEConfig(capacity_factor=1.25), model=ModelConfig(compute_dtype="bfloat16"),
      data=DataConfig(seq_len=4096),
      train=TrainConfig(steps=100, batch_size=8 * chips, warmup_steps=1),
      execution=ExecutionConfig(mesh=MeshConfig(fsdp=chips), remat="full"))


_TIERING = "MaxText docs/reference/models/tiering.md (2025)"
PUBLISHED = (
    Measured("Mixtral 8x7B", _mixtral(128), "v5p-256", 2909.0,
             f"{_TIERING}; 8 sequences a chip and full remat are our guess"),
    Measured("Mixtral 8x7B", _mixtral(256), "v6e-256", 3899.0,
             f"{_TIERING}; 8 sequences a chip as tpu-recipes' log says, full remat our guess"),
)


def of_run(path: str, topology: str, n_slices: int) -> Measured:
  """Returns the speed that a finished run recorded.

  Raises:
    FieldError: there is no such run, it recorded no speed, it took several attempts, or it ran on
      another kind of TPU or another number of devices.
  """
  run = RunDir(epath.Path(path))
  where = topology_lib.parse(topology, n_slices)
  require(run.path.exists(), "run", path, "no such directory")
  config, status = run.read_config(), run.read_status()
  speed, kind = status.get("tokens_per_second"), status.get("device_kind")
  require(config is not None and speed is not None, "run", path,
          "holds no run with a measured speed")
  require(status.get("attempt", 1) == 1, "run", path, "went on in a further attempt, which may "
          "have had another mesh or remat than the configuration that is kept")
  require(kind in where.hardware.device_kinds, "run", path,
          f"was measured on {kind!r}, which is no {where.hardware.name}")
  require(status.get("n_devices") == where.devices, "run", path, f"was measured on "
          f"{status.get('n_devices')} devices; {where.label} has {where.devices}")
  return Measured(run.path.name, config, topology, speed / where.chips, str(run.path), n_slices)


def compare(measured: Sequence[Measured], out: str) -> list[dict[str, Any]]:
  """Plans each configuration; returns a row of estimate and measurement for each."""
  rows = []
  for point in measured:
    where = topology_lib.parse(point.topology, point.n_slices)
    cells.check_libtpu(where)
    plan = cells.plan_config(point.name, point.config, where, out)
    print(f"{point.name} on {where.label}: {cells.verdict(plan)}", flush=True)
    tokens = point.config.batch_tokens / where.chips
    seconds = tokens / point.tokens_per_second
    flops = count.training_flops_per_token(point.config.arch, point.config.data.seq_len)
    rows.append({
        "name": point.name, "topology": where.label, "source": point.source,
        "measured_seconds": seconds, "estimated_seconds": plan.seconds,
        "ratio": plan.seconds and plan.seconds / seconds, "fits": plan.fits,
        "measured_mfu": flops * point.tokens_per_second / where.hardware.bf16_flops,
        "estimated_mfu": plan.mfu, "error": plan.error})
  return rows
