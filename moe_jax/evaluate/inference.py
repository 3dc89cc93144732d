"""Measures the cost of inference, prefill and decode of a run's own text, on these devices.

Each decode time comes with two lower bounds. `limit`: the bytes that a step must read, at the
measured memory bandwidth. `roofline`: the estimate of moe_jax.design from the published peaks of
these chips or, where there are none (a CPU), from peaks measured here. Both count the experts that
a batch is expected to touch.
"""

import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.arch import count
from moe_jax.arch.hardware import Hardware, by_device_kind
from moe_jax.config import RunConfig, identity_hash, require_causal
from moe_jax.data.prepare import prepare
from moe_jax.design import inference as roofline
from moe_jax.errors import FieldError, require
from moe_jax.evaluate.cells import each_cell
from moe_jax.evaluate.cost import columns
from moe_jax.evaluate.decode import Decoder
from moe_jax.evaluate.generate import open_decoder
from moe_jax.evaluate.results import INFERENCE
from moe_jax.grid import Cell
from moe_jax.laws.shape import Shape
from moe_jax.mesh import mesh_size
from moe_jax.run_dir import RunDir
from moe_jax.train.loop import use_compilation_cache
from moe_jax.train.throughput import peak_flops

_STREAM_BYTES = {"cpu": 2**28}  # larger than any cache; 2**30 for accelerators
_STEPS = 24  # decode steps per measurement
_REPEATS = 5


class Machine(NamedTuple):
  """The measured devices.

  Attributes:
    bytes_per_second: memory bandwidth of all devices together, reads plus writes.
    slice: the chips for the roofline, with published peaks if known, otherwise measured ones.
  """

  bytes_per_second: float
  slice: roofline.Slice


def look_at(devices: Sequence[jax.Device]) -> Machine:
  """Measures memory bandwidth by scaling a large array; takes half a second."""
  kind, on_cpu = devices[0].device_kind, devices[0].platform == "cpu"
  size = _STREAM_BYTES.get(devices[0].platform, 2**30) // 4
  x = jax.device_put(jnp.ones(size, jnp.float32), devices[0])
  scale = jax.jit(lambda x: x * 1.5)
  seconds = [_seconds(lambda: scale(x)) for _ in range(_REPEATS + 1)][1:]
  n_chips = 1 if on_cpu else len(devices)  # fake devices share one machine
  bandwidth = n_chips * 2 * 4 * size / min(seconds)
  chip = by_device_kind(kind)
  if chip is None:
    chip = Hardware(kind, (peak_flops(list(devices)) or float("inf")) / n_chips, float("nan"),
                    bandwidth / n_chips, float("inf"), (kind,))
  elif chip.devices_per_chip > 1:
    n_chips = max(1, n_chips // chip.devices_per_chip)
  return Machine(bandwidth, roofline.Slice(chip, n_chips))


def decode_bytes(config: RunConfig, batch: int, context: int) -> float:
  """Bytes that a decode step must read: non-expert weights, touched experts and the cache."""
  shape, bytes_each = Shape.of(config.arch), count.dtype_bytes(config.model.compute_dtype)
  expert = 3 * shape.d_model * shape.d_expert * shape.n_moe_layers
  touched = float(roofline.touched_experts(shape.n_exp, shape.n_topk, batch))
  weights = (count.n_parameters(config.arch, 0) + touched * expert
             + config.arch.d_model * config.arch.vocab_size)
  return bytes_each * weights + count.kv_cache_bytes(config.arch, batch, context,
                                                     config.model.compute_dtype)


def measure(decoder: Decoder, tokens_N: np.ndarray, batch_sizes: Sequence[int],
            machine: Machine) -> dict[str, Any]:
  """Measures prefill of whole contexts from `tokens_N`, and decode at the end of each context.

  Returns:
    The content of eval/inference.json: `measured`, the results by batch size (times are medians
    over repeats), the bytes of weights and cache, and all of it as columns of results.csv.

  Raises:
    FieldError: a batch size is not a multiple of the number of devices; the text is too short.
  """
  config, context = decoder.config, decoder.config.data.seq_len
  n_devices = mesh_size(decoder.mesh)
  for batch in batch_sizes:
    require(batch % n_devices == 0, "batch_sizes", batch,
            f"must be a multiple of the {n_devices} devices")
  rows_NS = tokens_N[:len(tokens_N) // context * context].reshape(-1, context).astype(np.int32)
  if not len(rows_NS):
    raise FieldError("config.data.seq_len", context, f"is longer than the {len(tokens_N)} tokens "
                     "of the held-out split")
  shape = Shape.of(config.arch)
  measured = []
  for batch in batch_sizes:
    rows_BS = rows_NS[np.arange(batch) % len(rows_NS)]
    prefill_seconds, decode_seconds = _times(decoder, rows_BS)
    limit = decode_bytes(config, batch, context) / machine.bytes_per_second
    serving = roofline.Serving(config.model.compute_dtype, batch, context, machine.slice)
    measured.append({
        "batch": batch, "prefill_tokens_per_second": batch * context / prefill_seconds,
        "decode_ms": 1e3 * decode_seconds, "decode_limit_ms": 1e3 * limit,
        "decode_bandwidth_fraction": limit / decode_seconds,
        "decode_roofline_ms": float(roofline.decode_ms(shape, serving))})
  device = decoder.mesh.devices.flat[0]
  result = {
      "device_kind": device.device_kind, "n_devices": n_devices,
      "dtype": config.model.compute_dtype, "context": context,
      "memory_bytes_per_second": machine.bytes_per_second,
      "weight_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(decoder.params)),
      "cache_bytes_per_sequence": sum(leaf.nbytes for leaf in decoder.empty_cache(
          n_devices, context)) // n_devices,
      "measured": measured}
  return result | {"columns": columns(result)}


def measure_cells(cells: Sequence[Cell], out: str | os.PathLike, batch_sizes: Sequence[int],
                  say: Callable[[str], None] = print) -> list[str]:
  """Measures finished cells into eval/inference.json, even if done before; see evaluate_cells."""
  from etils import epath
  use_compilation_cache(out)
  machine = look_at(jax.devices())

  def work(cell: Cell, say: Callable[[str], None]) -> None:
    require_causal(cell.config)
    run_dir = RunDir.of(out, cell)
    own = prepare(cell.config.data, epath.Path(out) / "_data")
    step, decoder = open_decoder(cell, run_dir, own)
    found = measure(decoder, own.splits["heldout"].tokens_N, batch_sizes, machine)
    run_dir.write_eval(INFERENCE, {"step": step, "identity": identity_hash(cell.config)} | found)
    say("inference measured")

  return each_cell(cells, work, say)


def _times(decoder: Decoder, rows_BS: np.ndarray) -> tuple[float, float]:
  """Returns the median seconds of a prefill and of one decode step."""
  batch, context = rows_BS.shape
  steps = min(_STEPS, context - 1)
  first = context - steps
  length_B = np.full(batch, context, np.int32)
  tokens = [decoder.put(rows_BS[:, at], np.full(batch, at, np.int32))
            for at in range(first, context)]
  prefill, decode = [], []
  for _ in range(_REPEATS + 1):
    cache = jax.block_until_ready(decoder.empty_cache(batch, context))
    started = time.perf_counter()
    _, cache = jax.block_until_ready(decoder.prefill(cache, rows_BS, length_B))
    prefill.append(time.perf_counter() - started)
    started = time.perf_counter()
    for token_B, position_B in tokens:
      logits_BV, cache = decoder.decode(cache, token_B, position_B)
    jax.block_until_ready(logits_BV)
    decode.append((time.perf_counter() - started) / steps)
  return statistics.median(prefill[1:]), statistics.median(decode[1:])


def _seconds(work) -> float:
  started = time.perf_counter()
  jax.block_until_ready(work())
  return time.perf_counter() - started
