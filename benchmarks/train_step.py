"""Compares a training step with Hugging Face's Qwen3MoeForCausalLM and with two lower bounds.

    pip install torch==2.13.0 transformers
    python -m benchmarks.train_step --step_shape=a --step_dtype=float32

Both sides have the same architecture, weights, tokens and dtype, drop nothing, and run the forward
pass, backward pass, clipping and AdamW; the auxiliary losses, which the two define differently,
have weight 0, and the losses of the first step must agree. Each side runs in its own process, and
they take turns of a few steps, so that both see the same load; the first step of a turn is
discarded, as it reclaims memory that was returned to the system while the others ran. Figures are
medians. Each requested backend of the peer has a row; the fastest is the one to compare with. The
lower bounds are all matrix products of the step, each at the best speed that either side reaches on
its shape, and the bytes that the products and AdamW must move, at the bandwidth of a copy. In
bfloat16 ours keeps float32 master weights and the peer does not. On a busy machine, --step_cores=1
keeps the peer's threads from waiting for one another. Prints a table, then the same figures as
JSON. Without the peer's packages, only ours is measured.
"""

import dataclasses
import importlib.util
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
from typing import Any

import numpy as np
from absl import flags

from benchmarks.iso_solver import machine
from benchmarks.step_limits import matmul_seconds, products, step_bytes
from moe_jax import cli
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
    to_dict,
)
from moe_jax.design.sheet import Sheet, print_sheet
from moe_jax.errors import require

ARCHS = {name: Architecture(n_layers=4, d_model=256, n_heads=4, vocab_size=8192, n_exp=n_exp,
                            n_topk=n_topk, d_expert=d_expert)
         for name, (n_exp, n_topk, d_expert) in {"a": (32, 4, 64), "b": (64, 8, 32)}.items()}
BACKENDS = ("eager", "grouped_mm", "batched_mm")
_TURN = 3  # steps per turn, of which the first is discarded

_SHAPE = flags.DEFINE_enum("step_shape", "a", sorted(ARCHS), "Which architecture.")
_DTYPE = flags.DEFINE_enum("step_dtype", "float32", ["float32", "bfloat16"], "Of activations.")
_ROUNDS = flags.DEFINE_integer("step_rounds", 3, "Number of alternating measurements of each side.")
_CORES = flags.DEFINE_integer("step_cores", 0, "CPU cores for each side; 0 means all.")
_BACKENDS = flags.DEFINE_list("step_backends", list(BACKENDS[:2]), "Expert backends of the peer; "
                              f"the fastest counts: some of {', '.join(BACKENDS)}.")


def config_of(arch: Architecture, dtype: str, sequences: int = 16, seq_len: int = 256) -> RunConfig:
  """A configuration that matches the peer: no drops, no auxiliary losses, no document mask."""
  return RunConfig(
      arch=arch, moe=MoEConfig(dispatch="dropless", balance_coef=0.0, z_coef=0.0),
      model=ModelConfig(compute_dtype=dtype), data=DataConfig(seq_len=seq_len,
                                                              mask_documents=False),
      train=TrainConfig(batch_size=sequences), execution=ExecutionConfig(mesh=MeshConfig(1, 1, 1)))


class Child:
  """A child process that runs one side and answers requests (step_serve.py)."""

  def __init__(self, module: str, *args: str, cores: int = 0):
    mine = sorted(os.sched_getaffinity(0))[-cores:] if cores else None
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with the child)
    self._process = subprocess.Popen(
        [sys.executable, "-m", module, *args], text=True, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=self._errors, env=environment,
        cwd=pathlib.Path(__file__).parent.parent,
        preexec_fn=mine and (lambda: os.sched_setaffinity(0, mine)))
    self.name = self._read()["ready"]

  def ask(self, part: str) -> dict[str, Any]:
    self._process.stdin.write(part + "\n")
    self._process.stdin.flush()
    return self._read()

  def _read(self) -> dict[str, Any]:
    line = self._process.stdout.readline()
    while line and not line.startswith("{"):  # skip what libraries print
      line = self._process.stdout.readline()
    if not line:
      self.close()
      self._errors.seek(0)
      raise RuntimeError(self._errors.read()[-2000:])
    return json.loads(line)

  def close(self) -> None:
    self._process.communicate()


def measure(config: RunConfig, backends: list[str], rounds: int, cores: int) -> dict[str, Any]:
  """Measures ours and each backend. Raises RuntimeError if the first losses disagree."""
  with tempfile.TemporaryDirectory() as folder:
    paths = f"{folder}/tokens.npy", f"{folder}/weights.npz"
    shape = (config.train.batch_size, config.data.seq_len + 1)
    np.save(paths[0], np.random.default_rng(0).integers(0, config.arch.vocab_size, shape, np.int32))
    text, children = json.dumps(to_dict(config)), {}
    try:
      children["ours"] = Child("benchmarks.step_ours", text, *paths, cores=cores)
      for backend in backends:
        children[backend] = Child("benchmarks.step_peer", text, *paths, backend, cores=cores)
      firsts = {name: child.ask("step")["value"] for name, child in children.items()}
      require_equal(firsts, config)
      answers = {name: {"step": [], "head": []} for name in children}
      for part in ("step", "head"):
        for _ in range(rounds):
          for name, child in children.items():
            answers[name][part] += [child.ask(part) for _ in range(_TURN)][1:]
      sides = {name: {"what": children[name].name, "first_loss": firsts[name]}
               | _figures(parts["step"], parts["head"], config) for name, parts in answers.items()}
      measured = [child.ask("matmuls")["value"] for name, child in children.items()
                  if name in ("ours", *backends[:1])]
      return {"sides": sides, "limits": _limits(
          config, measured, children["ours"].ask("bandwidth")["value"])}
    finally:
      for child in children.values():
        child.close()


def require_equal(losses: dict[str, float], config: RunConfig) -> None:
  """Raises RuntimeError if the losses of the first step differ beyond rounding."""
  tolerance = 1e-4 if config.model.compute_dtype == "float32" else 1e-2
  if max(losses.values()) - min(losses.values()) > tolerance:
    raise RuntimeError(f"the first losses disagree, so the models are not the same: {losses}")


def _figures(steps, heads, config) -> dict[str, Any]:
  def median(rows, key):
    return statistics.median(row[key] for row in rows)

  seconds = median(steps, "seconds")
  return {"step_seconds": seconds,
          "step_cpu_seconds": median(steps, "cpu_seconds"),
          "head_seconds": median(heads, "seconds"),
          "head_cpu_seconds": median(heads, "cpu_seconds"),
          "tokens_per_second": config.batch_tokens / seconds,
          "peak_mb_of_steps": steps[-1]["peak_mb"]}


def _limits(config: RunConfig, measured: list[list[float]], bandwidth: float) -> dict[str, float]:
  made = products(config.arch, config.train.batch_size, config.data.seq_len)
  itemsize = {"float32": 4, "bfloat16": 2}[config.model.compute_dtype]
  n_params = count.n_total_with_embedding(config.arch)
  moved, flops = step_bytes(made, n_params, itemsize), sum(product.flops for product in made)
  seconds = matmul_seconds(made, *measured)
  return {"matmul_seconds": seconds, "matmul_gflops": flops / 1e9, "gflop_per_second":
          flops / seconds / 1e9, "bytes": moved, "bytes_per_second": bandwidth,
          "bytes_seconds": moved / bandwidth}


def main(overrides: list[str]) -> None:
  cli.no_overrides(overrides)
  require(_ROUNDS.value >= 1, "step_rounds", _ROUNDS.value, "must be at least 1")
  require(0 <= _CORES.value <= os.cpu_count(), "step_cores", _CORES.value,
          f"must be 0 (all) or at most {os.cpu_count()}")
  unknown = [backend for backend in _BACKENDS.value if backend not in BACKENDS]
  require(not unknown, "step_backends", unknown, f"must be some of {', '.join(BACKENDS)}")
  backends = list(_BACKENDS.value)
  if not all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
    print("no peer here: pip install torch==2.13.0 transformers", file=sys.stderr)
    backends = []
  config = config_of(ARCHS[_SHAPE.value], _DTYPE.value)
  found = measure(config, backends, _ROUNDS.value, _CORES.value)
  limits, ours = found["limits"], found["sides"]["ours"]
  sheet = Sheet(
      f"one training step, shape {_SHAPE.value}, {_DTYPE.value}, {config.train.batch_size} x "
      f"{config.data.seq_len} tokens", ["side"],
      ["step [s]", "cpu [s]", "head [s]", "tokens/s", "ours is x", "by cpu x", "peak [MB]",
       "first loss"],
      f"Matmuls alone {limits['matmul_seconds']:.2f} s ({limits['gflop_per_second']:.0f} GFLOP/s), "
      f"bytes alone {limits['bytes_seconds']:.2f} s; ours is at "
      f"{limits['matmul_seconds'] / ours['step_seconds']:.0%} of the matmul limit.")
  for name, side in found["sides"].items():
    sheet.add(name, f"{side['step_seconds']:.2f}", f"{side['step_cpu_seconds']:.2f}",
              f"{side['head_seconds']:.2f}", f"{side['tokens_per_second']:.0f}",
              f"{side['step_seconds'] / ours['step_seconds']:.2f}",
              f"{side['step_cpu_seconds'] / ours['step_cpu_seconds']:.2f}",
              f"{side['peak_mb_of_steps']:.0f}", f"{side['first_loss']:.5f}")
  print_sheet(sheet)
  print(json.dumps({"machine": machine(), "load_average": os.getloadavg(), "cores": _CORES.value,
                    "arch": dataclasses.asdict(config.arch), "dtype": _DTYPE.value, **found},
                   indent=2))


if __name__ == "__main__":
  cli.run(main)
