"""Time of one MoE layer by each dispatch, on one device: forward, and with every gradient.

    python -m benchmarks.dispatch

`capacity` 1.25 is what training does by default and drops what overflows; `capacity` E/K has a
slot for every token at every expert and so drops nothing; `dropless` drops nothing either. The
passes alternate, so that all see the same machine, and the fastest of each counts. Where
nothing drops the outputs must agree. Prints a table, then the same figures as JSON.
"""

import json
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks.iso_solver import machine
from moe_jax import cli
from moe_jax.design.sheet import Sheet, print_sheet
from moe_jax.errors import require
from moe_jax.mesh import MESH_AXES
from moe_jax.moe.dispatch import expert_capacity
from moe_jax.moe.expert_parallel import Experts, Semantics, sharded_moe_layer

_REPEATS = flags.DEFINE_integer("passes", 10, "Passes of which the fastest counts.")
_SEQUENCES = flags.DEFINE_integer("sequences", 16, "Sequences of 256 tokens.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Type of the tokens.")

SEQ_LEN, D_MODEL = 256, 256
LAYERS = ((8, 2, 128), (32, 4, 64), (64, 8, 32))  # (n_exp, n_topk, d_expert), equal active size


def measure(layer: tuple[int, int, int], sequences: int, dtype: str,
            repeats: int) -> dict[str, dict[str, float]]:
  """Milliseconds of a layer by each dispatch, and assignments dropped."""
  n_exp, n_topk, d_expert = layer
  mesh = jax.make_mesh((1, 1, 1), MESH_AXES, devices=jax.devices()[:1],
                       axis_types=(jax.sharding.AxisType.Auto,) * 3)
  inputs = _inputs(n_exp, d_expert, sequences, dtype)
  passes = {}
  for name, factor in (("capacity 1.25", 1.25), ("capacity E/K", n_exp / n_topk),
                       ("dropless", None)):
    slots = None if factor is None else expert_capacity(factor, SEQ_LEN, n_topk, n_exp)
    semantics = Semantics(n_topk, True, SEQ_LEN, slots, dropless=factor is None)

    def forward(*inputs, semantics=semantics):
      return sharded_moe_layer(*inputs, semantics, mesh)

    def loss(*inputs, forward=forward):
      return (forward(*inputs)[0].astype(jnp.float32)**2).sum()

    passes[name] = jax.jit(forward), jax.jit(jax.grad(loss, argnums=(0, 1, 2)))

  outputs = {name: jax.block_until_ready((forward(*inputs), backward(*inputs)))
             for name, (forward, backward) in passes.items()}
  difference = np.abs(np.float32(outputs["dropless"][0][0])
                      - np.float32(outputs["capacity E/K"][0][0])).max()
  scale = np.abs(np.float32(outputs["dropless"][0][0])).max()
  assert difference <= scale * (1e-5 if dtype == "float32" else 2**-5), difference
  fastest = {name: [np.inf, np.inf] for name in passes}
  for _ in range(repeats):
    for name, both in passes.items():
      for i, run in enumerate(both):
        started = time.perf_counter()
        jax.block_until_ready(run(*inputs))
        fastest[name][i] = min(fastest[name][i], 1e3 * (time.perf_counter() - started))
  return {name: {"forward_ms": forward, "gradients_ms": gradients,
                 "dropped": float(outputs[name][0][1].dropped)}
          for name, (forward, gradients) in fastest.items()}


def _inputs(n_exp: int, d_expert: int, sequences: int, dtype: str) -> tuple[Any, ...]:
  keys = jax.random.split(jax.random.key(0), 5)
  shapes = ((n_exp, D_MODEL, d_expert), (n_exp, D_MODEL, d_expert), (n_exp, d_expert, D_MODEL))
  experts = Experts(*(jax.random.normal(key, shape) / 16
                      for key, shape in zip(keys[2:], shapes, strict=True)))
  return (jax.random.normal(keys[0], (sequences, SEQ_LEN, D_MODEL), dtype),
          jax.random.normal(keys[1], (D_MODEL, n_exp)) / 20, experts)


def main(_) -> None:
  for flag in (_REPEATS, _SEQUENCES):
    require(flag.value >= 1, flag.name, flag.value, "must be at least 1")
  sheet = Sheet(f"one MoE layer, {_SEQUENCES.value} x {SEQ_LEN} tokens, d_model {D_MODEL}, "
                f"{_DTYPE.value}", ["layer", "dispatch"],
                ["forward [ms]", "with gradients [ms]", "dropped"])
  rows = {}
  for layer in LAYERS:
    name = "e{}-k{}-f{}".format(*layer)
    rows[name] = measure(layer, _SEQUENCES.value, _DTYPE.value, _REPEATS.value)
    for dispatch, row in rows[name].items():
      sheet.add(name, dispatch, f"{row['forward_ms']:.0f}", f"{row['gradients_ms']:.0f}",
                f"{row['dropped']:.0f}")
  print_sheet(sheet)
  print(json.dumps({"machine": machine(), "device": jax.devices()[0].device_kind,
                    "layers": rows}, indent=2))


if __name__ == "__main__":
  cli.run(main)
