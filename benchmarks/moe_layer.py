"""Breaks down the time of one MoE layer on one device, for each dispatch.

    python -m benchmarks.moe_layer

There are two sweeps: granularity 1 to 16 at equal active FLOPs and sparsity, and 1k to 64k tokens
at granularity 4, with the exponent of time against tokens. The parts are compiled and timed
separately: route (logits, top-k), dispatch (assigning slots and moving the rows there), experts,
combine; and the whole layer. `forward` is a forward pass, `gradients` a forward and a backward pass
for every input. `capacity` drops what exceeds 1.25 times the mean, `dropless` nothing. The passes
are interleaved, so that all see the same load, and the fastest of each counts. Prints tables, then
the same figures as JSON.
"""

import functools
import json
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks.iso_solver import machine
from benchmarks.timing import fastest
from moe_jax import cli
from moe_jax.design.sheet import Sheet, print_sheet
from moe_jax.errors import require
from moe_jax.memory import use_huge_pages
from moe_jax.mesh import MESH_AXES
from moe_jax.moe.dispatch import (
  assign_slots,
  expert_capacity,
  gather_rows,
  gather_weights,
  sum_rows,
)
from moe_jax.moe.dropless import sort_slots
from moe_jax.moe.expert_parallel import sharded_moe_layer
from moe_jax.moe.experts import Experts, grouped_swiglu, swiglu
from moe_jax.moe.layer import Semantics
from moe_jax.moe.router import route

_SWEEPS = flags.DEFINE_multi_enum("layer_sweeps", ["granularity", "tokens"],
                                  ["granularity", "tokens"], "Variable to sweep; may be repeated.")
_PASSES = flags.DEFINE_integer("layer_passes", 5, "Number of passes; the fastest counts.")
_SEQUENCES = flags.DEFINE_integer("layer_sequences", 16, "Sequences of 256 tokens in the sweep "
                                  "over granularity.")
_DTYPE = flags.DEFINE_enum("layer_dtype", "float32", ["float32", "bfloat16"], "Of the tokens.")

SEQ_LEN, D_MODEL, ACTIVE_WIDTH, SPARSITY = 256, 256, 256, 8
COUNTS = tuple(2**i for i in range(2, 9))  # sequences in the sweep over tokens
PARTS = ("route", "dispatch", "experts", "combine", "layer")
KINDS = ("forward", "gradients")


class Layer(NamedTuple):
  """One layer with `granularity` experts per token, each narrower by the same factor."""

  granularity: int
  sequences: int
  dispatch: str
  dtype: str

  @property
  def n_exp(self) -> int:
    return SPARSITY * self.granularity

  @property
  def d_expert(self) -> int:
    return ACTIVE_WIDTH // self.granularity

  @property
  def semantics(self) -> Semantics:
    capacity = expert_capacity(1.25, SEQ_LEN, self.granularity, self.n_exp)
    return Semantics(self.granularity, self.granularity > 1, SEQ_LEN, capacity, self.dispatch)


def parts_of(layer: Layer) -> dict[str, tuple[Callable, tuple]]:
  """Part -> (function, inputs); floating-point inputs are differentiated."""
  keys = jax.random.split(jax.random.key(0), 5)
  e, f, semantics = layer.n_exp, layer.d_expert, layer.semantics
  x_BSD = jax.random.normal(keys[0], (layer.sequences, SEQ_LEN, D_MODEL), layer.dtype)
  w_router_DE = jax.random.normal(keys[1], (D_MODEL, e)) / 40
  experts = Experts(*(jax.random.normal(key, shape) / 16 for key, shape in zip(
      keys[2:], ((e, D_MODEL, f), (e, D_MODEL, f), (e, f, D_MODEL)), strict=True)))
  mesh = jax.make_mesh((1, 1, 1), MESH_AXES, devices=jax.devices()[:1],
                       axis_types=(jax.sharding.AxisType.Auto,) * 3)
  x_TD = x_BSD.reshape(-1, D_MODEL)
  routing = jax.jit(route, static_argnums=(2, 3))(x_TD, w_router_DE, semantics.n_topk,
                                                  semantics.norm_topk_prob)
  if semantics.dispatch == "dropless":
    slots, size_E = jax.jit(sort_slots, static_argnums=1)(routing.expert_TK, e)
  else:
    slots = jax.jit(assign_slots, static_argnums=(1, 2, 3))(
        routing.expert_TK, e, SEQ_LEN, semantics.capacity)
  rows_SD, weight_S = gather_rows(x_TD, slots), gather_weights(routing.weight_TK, slots)

  def send(x_TD, weight_TK, expert_TK):
    if semantics.dispatch == "dropless":
      made, _ = sort_slots(expert_TK, e)
    else:
      made = assign_slots(expert_TK, e, SEQ_LEN, semantics.capacity)
    return gather_rows(x_TD, made), gather_weights(weight_TK, made)

  def run(rows_SD, weight_S, experts):
    if semantics.dispatch == "dropless":
      return grouped_swiglu(rows_SD, weight_S, size_E, experts, jax.devices()[0].platform)
    return swiglu(rows_SD.reshape(e, -1, D_MODEL), weight_S.reshape(e, -1),
                  experts=Experts(*(w.astype(rows_SD.dtype) for w in experts)),
                  platform=jax.devices()[0].platform)

  return {
      "route": (lambda x, w: route(x, w, semantics.n_topk, semantics.norm_topk_prob)[1:3],
                (x_TD, w_router_DE)),
      "dispatch": (send, (x_TD, routing.weight_TK, routing.expert_TK)),
      "experts": (run, (rows_SD, weight_S, experts)),
      "combine": (sum_rows, (rows_SD, slots)),
      "layer": (lambda x, w, experts: sharded_moe_layer(x, w, experts, semantics, mesh)[0],
                (x_BSD, w_router_DE, experts))}


def measure(layers: list[Layer], passes: int) -> list[dict[str, dict[str, float]]]:
  """Times each part of each layer, forward and with gradients, in milliseconds."""
  programs = {(number, part, name): run for number, layer in enumerate(layers)
              for part, parts in parts_of(layer).items()
              for name, run in _compile(*parts).items()}
  seconds = fastest(programs, passes)
  return [{part: {name: 1e3 * seconds[number, part, name] for name in KINDS} for part in PARTS}
          for number in range(len(layers))]


def _compile(function: Callable, inputs: tuple) -> dict[str, Callable]:
  """Compiles the forward pass and the gradients of a loss, each bound to its inputs."""
  floating = tuple(i for i, x in enumerate(inputs)
                   if jnp.issubdtype(jax.tree.leaves(x)[0].dtype, jnp.floating))

  def total(*inputs):  # squared: the gradient of a plain sum would be constant
    return sum((y.astype(jnp.float32)**2).sum() for y in jax.tree.leaves(function(*inputs)))

  both = dict(zip(KINDS, (jax.jit(function), jax.jit(jax.grad(total, floating))), strict=True))
  for run in both.values():
    jax.block_until_ready(run(*inputs))
  return {name: functools.partial(run, *inputs) for name, run in both.items()}


def share_moved(found: dict[str, dict[str, float]], name: str) -> float:
  """Share of dispatch and combine in the sum of the parts."""
  parts = {part: times[name] for part, times in found.items() if part != "layer"}
  return (parts["dispatch"] + parts["combine"]) / sum(parts.values())


def exponent(tokens: list[int], milliseconds: list[float]) -> float:
  """Fits b in time = a * tokens^b, by least squares on the logarithms."""
  return float(np.polyfit(np.log(tokens), np.log(milliseconds), 1)[0])


def _show(title: str, layers: list[Layer], found: list[dict[str, Any]]) -> None:
  for name in KINDS:
    sheet = Sheet(f"{title}, {name} [ms]", ["dispatch", "granularity", "tokens"],
                  [*PARTS, "dispatch + combine"])
    for layer, times in zip(layers, found, strict=True):
      sheet.add(layer.dispatch, str(layer.granularity), str(layer.sequences * SEQ_LEN),
                *(f"{times[part][name]:.3f}" for part in PARTS), f"{share_moved(times, name):.0%}")
    print_sheet(sheet)


def main(overrides: list[str]) -> None:
  cli.no_overrides(overrides)
  for flag in (_PASSES, _SEQUENCES):
    require(flag.value >= 1, flag.name, flag.value, "must be at least 1")
  figures: dict[str, Any] = {}
  for dispatch in ("capacity", "dropless"):
    sweeps = {"granularity": [Layer(g, _SEQUENCES.value, dispatch, _DTYPE.value)
                              for g in (1, 2, 4, 8, 16)],
              "tokens": [Layer(4, count, dispatch, _DTYPE.value) for count in COUNTS]}
    for sweep in _SWEEPS.value:
      layers = sweeps[sweep]
      found = measure(layers, _PASSES.value)
      _show(f"one MoE layer over {sweep}, d_model {D_MODEL}, {_DTYPE.value}", layers, found)
      figures[f"{dispatch} over {sweep}"] = [
          {**layer._asdict(), **times} for layer, times in zip(layers, found, strict=True)]
      if sweep == "tokens":
        figures[f"{dispatch} exponent"] = exponent(
            [layer.sequences * SEQ_LEN for layer in layers],
            [times["layer"]["gradients"] for times in found])
        print(f"time grows with tokens^{figures[f'{dispatch} exponent']:.2f}")
  print(json.dumps({"machine": machine(), "device": jax.devices()[0].device_kind,
                    "jax": jax.__version__, "load_average": os.getloadavg(), **figures}, indent=2))


if __name__ == "__main__":
  use_huge_pages()  # as the trainer does
  cli.run(main)
