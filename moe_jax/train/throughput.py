"""Measures tokens per second and model FLOPs utilization (MFU)."""

import statistics
import time

import jax
import jax.numpy as jnp

from moe_jax.arch import count, hardware
from moe_jax.config import RunConfig
from moe_jax.products import precision_of


def peak_flops(devices: list[jax.Device]) -> float | None:
  """Peak FLOP/s of these devices together, or None if unknown.

  Accelerators: the published dense bfloat16 peak (arch/hardware.py); None rather than a wrong one.
  CPUs have no such figure: there it is the float32 speed of a large matrix product on the whole
  machine, which fake devices share, measured on the spot (a fifth of a second). For several CPU
  processes it is unknown, because they may run on several machines and only this one is measured.
  """
  known = hardware.by_device_kind(devices[0].device_kind)
  if known is not None:
    return known.device_bf16_flops * len(devices)
  if devices[0].platform != "cpu" or len({device.process_index for device in devices}) > 1:
    return None
  return product_flops(1024, "float32")


def product_flops(size: int, dtype: str, repeats: int = 5) -> float:
  """Measures the FLOP/s of [size, size] matrix products; returns the fastest of `repeats`.

  Sums are in float32 and rounded at the end, as in the model: with bfloat16 results, XLA's CPU
  compiler takes several times as long (moe_jax/products.py).
  """
  # Random, because a device that multiplies ones draws less power and runs faster.
  x = jax.random.normal(jax.random.key(0), (size, size), dtype)
  multiply = jax.jit(lambda x, y: jnp.matmul(
      x, y, precision=precision_of(x.dtype, jax.default_backend()),
      preferred_element_type=jnp.float32).astype(dtype))
  multiply(x, x).block_until_ready()
  seconds = []
  for _ in range(repeats):
    start = time.perf_counter()
    multiply(x, x).block_until_ready()
    seconds.append(time.perf_counter() - start)
  return 2 * size**3 / min(seconds)


class Throughput:
  """Measures throughput between successive calls of `look`.

  MFU counts the FLOPs of the active parameters and of causal attention, three forward passes
  per step (count.training_flops_per_token). Padding slots, recomputation and the expert FLOPs
  of dropped assignments are not useful work and are not counted.
  """

  def __init__(self, config: RunConfig, peak: float | None):
    """`peak` is the peak FLOP/s of all devices together; None omits the MFU."""
    arch = config.arch
    self._tokens, self._peak = config.batch_tokens, peak
    self._flops = count.training_flops_per_token(arch, config.data.seq_len)
    # Forward plus twice that backward, 2 FLOPs per weight, three matrices per expert.
    self._routed_flops = (3 * 2 * arch.n_moe_layers * arch.n_topk
                          * 3 * arch.d_model * arch.d_expert)
    self._last: tuple[int, float] | None = None
    self._speeds: list[dict[str, float]] = []

  def look(self, step: int, drop_rate: float = 0.0) -> dict[str, float]:
    """Returns `tokens_per_second` and `mfu` since the last call; {} if no step was taken since.

    `drop_rate` is this step's, taken for all steps since the last call.
    """
    now = time.perf_counter()
    (last_step, last_time), self._last = self._last or (step, now), (step, now)
    if step == last_step:
      return {}
    speed = (step - last_step) * self._tokens / (now - last_time)
    found = {"tokens_per_second": speed}
    if self._peak is not None:
      useful = self._flops - drop_rate * self._routed_flops
      found["mfu"] = speed * useful / self._peak
    self._speeds.append(found)
    return found

  def typical(self) -> dict[str, float]:
    """Medians over all measurements but the first, during which caches were cold."""
    speeds = self._speeds[1:] or self._speeds
    return {name: statistics.median(each[name] for each in speeds)
            for name in (speeds[0] if speeds else ())}
