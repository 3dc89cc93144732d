"""Compares training runs together with training them one after another, on one device.

    python -m benchmarks.population
    python -m benchmarks.population --population_model=bytes-5m --population_sizes=1,2,4,8,16,32
    python -m benchmarks.population --population_model=reference --population_sizes=1 \
        --config.moe.dispatch=dropless

--config.PATH=VALUE overrides fields of the model, e.g. the dispatch or the remat policy. It times
whole steps as the trainer runs them: batches are put on the device, metrics are fetched. Passes of
all sizes are interleaved, so that they see the same load, and the fastest of each counts. `of the
peak` is the rate of active FLOPs over that of a large matrix product on this device in the
dtype of the activations, measured here. Prints a table, then the same figures as JSON.
"""

import json
import math
import sys
import time

import jax
import numpy as np
from absl import flags

from benchmarks.iso_solver import machine
from experiments import quickstart, reference
from moe_jax import cli
from moe_jax.arch import count
from moe_jax.config import Architecture, DataConfig, MoEConfig, RunConfig, TrainConfig
from moe_jax.design.sheet import Sheet, print_sheet
from moe_jax.errors import FieldError, require
from moe_jax.fields import override
from moe_jax.memory import use_huge_pages
from moe_jax.mesh import make_mesh
from moe_jax.train.population import Population
from moe_jax.train.step import init_state
from moe_jax.train.throughput import product_flops

_SIZES = flags.DEFINE_list("population_sizes", ["1", "2", "4", "8"], "Sizes, starting with 1.")
_STEPS = flags.DEFINE_integer("population_steps", 5, "Number of steps in a pass.")
_PASSES = flags.DEFINE_integer("population_passes", 3, "Number of passes; the fastest counts.")
_MODEL = flags.DEFINE_enum("population_model", "quickstart",
                           ["quickstart", "bytes-5m", "reference"], "The cheapest cell of the "
                           "quickstart, 5M active parameters on bytes as in the study, or "
                           "experiments/reference.py with 8 sequences.")


def model(name: str) -> RunConfig:
  """The configuration that all members share, except for seeds and learning rates."""
  if name == "quickstart":
    return min(quickstart.get_grid().cells, key=lambda config: count.n_active(config.arch))
  if name == "reference":
    return override(reference.RECIPE, {"execution.mesh.fsdp": 1, "execution.mesh.expert": 1,
                                       "train.batch_size": 8})
  return RunConfig(
      arch=Architecture(n_layers=8, d_model=256, d_expert=128, n_exp=16, n_topk=4, n_heads=4),
      moe=MoEConfig(capacity_factor=2.0, routing_group_tokens=128 * 256),
      data=DataConfig(tokenizer="bytes", seq_len=256), train=TrainConfig(batch_size=128))


class Contender:
  """A compiled population of one size, to be timed."""

  def __init__(self, config: RunConfig, size: int):
    configs = [override(config, {"seed_init": i, "train.learning_rate": 1e-3 * (1 + i)})
               for i in range(size)]
    mesh = make_mesh(config, jax.devices()[:1])
    started = time.perf_counter()
    self._population = Population(configs, mesh)
    self.compile_seconds = time.perf_counter() - started
    self._state = self._population.join([init_state(each, mesh) for each in configs])
    shape = config.train.batch_size, config.data.seq_len
    tokens_BS = np.random.default_rng(0).integers(0, 256, shape, np.int32)
    batch = {"inputs_BS": tokens_BS, "targets_BS": np.roll(tokens_BS, -1, 1),
             "segments_BS": np.zeros(shape, np.int32)}
    self._batches = [batch] * size
    self.seconds = math.inf  # per step, in the fastest pass

  def run(self, steps: int) -> None:
    """Times a pass; a step's metrics are fetched while the next step runs, as in training."""
    started, pending = time.perf_counter(), None
    for _ in range(steps):
      self._state, metrics = self._population.step(
          self._state, self._population.put_batch(self._batches))
      if pending is not None:
        self._population.values(pending)
      pending = metrics
    assert all(math.isfinite(each["loss"]) for each in self._population.values(pending))
    self.seconds = min(self.seconds, (time.perf_counter() - started) / steps)


def matmul_peak(dtype: str) -> float:
  """FLOP/s of a large matrix product, the fastest of several runs."""
  return product_flops(1024 if jax.default_backend() == "cpu" else 8192, dtype)


def measure(config: RunConfig, sizes: list[int], steps: int, passes: int) -> list[dict]:
  """Returns a row per size, with an error for sizes that do not fit in the device's memory."""
  contenders: dict[int, Contender] = {}
  lost = []
  for size in sizes:
    try:
      made = contenders[size] = Contender(config, size)
      made.run(2)
      print(f"population {size}: compiled in {made.compile_seconds:.0f} s, first steps of "
            f"{1e3 * made.seconds:.1f} ms", file=sys.stderr, flush=True)  # in case time runs out
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      contenders.pop(size, None)
      lost.append(size)
  for contender in contenders.values():
    contender.seconds = math.inf
  for _ in range(passes):
    for contender in contenders.values():
      contender.run(steps)
  peak = matmul_peak(config.model.compute_dtype)
  flops = count.training_flops_per_token(config.arch, config.data.seq_len)
  rows = []
  for size, contender in contenders.items():
    speed = size * config.batch_tokens / contender.seconds
    rows.append({"population": size, "step_ms": 1e3 * contender.seconds,
                 "tokens_per_second": speed,
                 "over_one_after_another": (size * contenders[sizes[0]].seconds / contender.seconds
                                            if sizes[0] in contenders else None),
                 "share_of_matmul_peak": speed * flops / peak,
                 "compile_seconds": contender.compile_seconds})
  return rows + [{"population": size, "error": "out of memory"} for size in lost]


def _two_digits(value: float | None) -> str:
  return "" if value is None else f"{value:.2f}"


def main(overrides: list[str]) -> None:
  sizes = [int(text) if text.isdecimal() else 0 for text in _SIZES.value]
  require(sizes[:1] == [1] and min(sizes) >= 1, "population_sizes", ",".join(_SIZES.value),
          "must be whole numbers above 0, and begin with 1")
  for flag in (_STEPS, _PASSES):
    require(flag.value >= 1, flag.name, flag.value, "must be at least 1")
  changes = dict(map(cli.parse_override, overrides))
  try:
    config = override(model(_MODEL.value), changes)
  except FieldError as error:
    raise error.under("config") from None
  rows = measure(config, sizes, _STEPS.value, _PASSES.value)
  sheet = Sheet(f"{_MODEL.value}: {count.n_active(config.arch):,} active parameters, "
                f"{config.train.batch_size} x {config.data.seq_len} tokens a member, "
                f"{config.model.compute_dtype}", ["population"],
                ["step [ms]", "tokens/s", "over one after another", "of the peak",
                 "compilation [s]"])
  for row in rows:
    figures = ("out of memory", "", "", "", "") if "error" in row else (
        f"{row['step_ms']:.1f}", f"{row['tokens_per_second']:,.0f}",
        _two_digits(row["over_one_after_another"]), f"{row['share_of_matmul_peak']:.1%}",
        f"{row['compile_seconds']:.1f}")
    sheet.add(str(row["population"]), *figures)
  print_sheet(sheet)
  print(json.dumps({"machine": machine(), "jax": jax.__version__,
                    "device": jax.devices()[0].device_kind, "model": _MODEL.value,
                    "changes": overrides,
                    "rows": rows}, indent=2))


if __name__ == "__main__":
  use_huge_pages()  # as the trainer does
  cli.run(main)
