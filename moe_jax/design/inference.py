"""Estimates what a model costs to run: memory, and rooflines of decode and prefill.

A step has four parts, run one after the other; each takes the maximum of the time to move its
bytes and the time to do its arithmetic:

    projections, norms, routers, shared experts, dense layers: read once per step
    routed experts: those the step's tokens are routed to, read once
    attention: the cache is read (decode) or written (prefill)
    output head: read once

A step of T tokens touches E (1 - (1 - K/E)^T) of a layer's E experts on average if tokens
choose their K independently and uniformly; real routers are less even and touch fewer.

Weights, cache and arithmetic are spread evenly over the chips, at their peak bandwidth and
peak bfloat16 FLOP/s (even for weights of fewer bytes). Tensor and expert parallelism over all
chips then need two all-reduces per layer, each of T d_model bfloat16 numbers; a chip sends
2 (n - 1)/n times that many at the peak rate of its links, without overlap. Latencies, activations
and load imbalance are ignored. The estimates are therefore lower bounds, good for comparing
architectures; a measured step is slower.
"""

import dataclasses

import numpy as np
from numpy.typing import ArrayLike

from moe_jax.arch import count
from moe_jax.arch.hardware import HARDWARE, Hardware
from moe_jax.errors import FieldError, did_you_mean, require
from moe_jax.laws.shape import Shape

CACHE_DTYPE = "bfloat16"  # of keys and values, and of activations sent between chips
HBM_SHARE = 0.9  # share of a chip's memory for weights and cache; the rest is for activations
_ALIASES = {"bf16": "bfloat16", "fp8": "float8", "f32": "float32"}


@dataclasses.dataclass(frozen=True)
class Slice:
  """Chips that serve one copy of the model."""

  chip: Hardware
  n_chips: int

  @property
  def usable_gb(self) -> float:
    """Decimal gigabytes available for weights and cache on all chips together."""
    return HBM_SHARE * self.n_chips * self.chip.hbm_bytes / 1e9

  def __str__(self) -> str:
    return f"{self.chip.name}-{self.n_chips}"


@dataclasses.dataclass(frozen=True)
class Serving:
  """How the model is served.

  Attributes:
    dtype: dtype of the stored weights, a key of count.DTYPE_BYTES.
    batch: sequences decoded together.
    context: tokens in each sequence's cache; also the length of a prompt.
    slice: the chips; None if no time is estimated.
  """

  dtype: str = "bfloat16"
  batch: int = 1
  context: int = 4096
  slice: Slice | None = None

  def __post_init__(self):
    require(self.batch >= 1, "batch", self.batch, "must be at least 1")
    require(self.context >= 1, "context", self.context, "must be at least 1")
    count.dtype_bytes(self.dtype)


def parse_slice(text: str) -> Slice:
  """Parses `v5e-8` as 8 v5e chips, and `h100` as one; always counts chips. Raises FieldError."""
  name, n_chips = text.lower(), "1"
  if name not in HARDWARE:
    name, _, n_chips = text.lower().rpartition("-")
  if name not in HARDWARE or not n_chips.isdecimal() or int(n_chips) < 1:
    raise FieldError("hardware", text, "must be CHIP-CHIPS such as v5e-8; "
                     + did_you_mean(name or text.lower(), list(HARDWARE)))
  return Slice(HARDWARE[name], int(n_chips))


def parse_dtype(text: str) -> str:
  """Parses a key of count.DTYPE_BYTES or a short form such as bf16. Raises FieldError."""
  name = _ALIASES.get(text.lower(), text.lower())
  count.dtype_bytes(name)
  return name


def memory_gb(shape: Shape, serving: Serving) -> np.ndarray:
  """Returns decimal gigabytes of all weights, including embeddings, and of the batch's cache."""
  return (count.weight_bytes(shape, serving.dtype)
          + count.kv_cache_bytes(shape, serving.batch, serving.context, CACHE_DTYPE)) / 1e9


def touched_experts(n_exp: ArrayLike, n_topk: ArrayLike, n_tokens: ArrayLike) -> np.ndarray:
  """Expected number of distinct experts when each token picks n_topk of n_exp uniformly."""
  with np.errstate(divide="ignore"):  # if all experts are chosen, log1p(-1) is -inf as intended
    missed = np.log1p(-np.divide(n_topk, n_exp)) * n_tokens
  return -np.multiply(n_exp, np.expm1(missed))


def decode_ms(shape: Shape, serving: Serving) -> np.ndarray:
  """Estimates the milliseconds to decode one more token for each sequence of the batch."""
  batch, context = serving.batch, serving.context
  cache = count.kv_cache_bytes(shape, batch, context, CACHE_DTYPE)
  flops = batch * count.decode_flops_per_token(shape, context)
  return _milliseconds(shape, serving, batch, batch, flops, _attention_flops(shape) * context
                       * batch, cache)


def prefill_ms(shape: Shape, serving: Serving) -> np.ndarray:
  """Estimates the milliseconds to prefill one prompt of `context` tokens."""
  context = serving.context
  cache = count.kv_cache_bytes(shape, 1, context, CACHE_DTYPE)
  flops = context * count.prefill_flops_per_token(shape, context)
  return _milliseconds(shape, serving, context, 1, flops, _attention_flops(shape) * context
                       * (context + 1) / 2, cache)


def _attention_flops(shape: Shape) -> np.ndarray:
  """FLOPs of attention scores and values per pair of query and key, over all layers."""
  return 4 * np.multiply(shape.n_layers, shape.n_heads) * shape.d_head


def _milliseconds(shape: Shape, serving: Serving, n_tokens: int, n_outputs: int, flops,
                  attention_flops, cache_bytes) -> np.ndarray:
  """Time of a step of `n_tokens`, `n_outputs` of them sampled: four parts plus all-reduces."""
  if serving.slice is None:
    raise FieldError("hardware", None, "is missing: estimates of time need it, e.g. v5e-8")
  chip, n_chips = serving.slice.chip, serving.slice.n_chips
  bytes_each = count.dtype_bytes(serving.dtype)
  expert = 3 * np.multiply(shape.d_model, shape.d_expert) * shape.n_moe_layers
  head = np.multiply(shape.d_model, shape.vocab_size)
  expert_flops = 2 * n_tokens * shape.n_topk * expert
  head_flops = 2 * n_outputs * head
  touched = touched_experts(shape.n_exp, shape.n_topk, n_tokens)
  rest_flops = flops - expert_flops - head_flops - attention_flops
  parts = ((count.n_parameters(shape, 0) * bytes_each, rest_flops),
           (touched * expert * bytes_each, expert_flops),
           (cache_bytes, attention_flops),
           (head * bytes_each, head_flops))
  seconds = sum(np.maximum(moved / chip.hbm_bytes_per_second, work / chip.bf16_flops)
                for moved, work in parts) / n_chips
  sent = (2 * np.multiply(shape.n_layers, shape.d_model) * n_tokens
          * count.dtype_bytes(CACHE_DTYPE) * 2 * (n_chips - 1) / n_chips)
  return 1e3 * (seconds + sent / chip.link_bytes_per_second)
