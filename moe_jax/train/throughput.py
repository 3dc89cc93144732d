"""Tokens per second, and what share of the machine's peak they are."""

import time

import jax
import jax.numpy as jnp

from moe_jax.arch import hardware


def peak_flops(devices: list[jax.Device]) -> float:
  """Peak FLOP/s of these devices together.

  Accelerators: the published dense bfloat16 peak (arch/hardware.py). A processor has no such
  figure: there it is the float32 speed of a large matrix product, measured now (a fifth of a
  second), of the whole machine, which fake devices share.
  """
  known = hardware.by_device_kind(devices[0].device_kind)
  if known is not None:
    return known.device_bf16_flops * len(devices)
  size, repeats = 1024, 5
  x = jnp.ones((size, size), jnp.float32)
  multiply = jax.jit(jnp.matmul)
  multiply(x, x).block_until_ready()
  seconds = []
  for _ in range(repeats):
    start = time.perf_counter()
    multiply(x, x).block_until_ready()
    seconds.append(time.perf_counter() - start)
  return 2 * size**3 / min(seconds)


class Throughput:
  """Speed between two looks.

  MFU counts the FLOPs of the active parameters and of causal attention, three forward passes
  a step (arch.training_flops_per_token); padding slots, dropped tokens and recomputation are
  no useful work and are not counted.
  """

  def __init__(self, tokens_per_step: int, flops_per_token: float, peak: float):
    self._tokens, self._flops, self._peak = tokens_per_step, flops_per_token, peak
    self._last: tuple[int, float] | None = None

  def look(self, step: int) -> dict[str, float]:
    """`tokens_per_second` and `mfu` since the last look; {} where no step lies between."""
    now = time.perf_counter()
    (last_step, last_time), self._last = self._last or (step, now), (step, now)
    if step == last_step:
      return {}
    speed = (step - last_step) * self._tokens / (now - last_time)
    return {"tokens_per_second": speed, "mfu": speed * self._flops / self._peak}
