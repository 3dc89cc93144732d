"""Budgets: upper bounds on an architecture's costs, in the units of their flags."""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np

from moe_jax.design import inference
from moe_jax.design.inference import Serving
from moe_jax.laws.shape import Shape
from moe_jax.text import short

MEMORY = "memory_gb"


@dataclasses.dataclass(frozen=True)
class Budget:
  """An upper bound on one quantity.

  Attributes:
    field: the flag that sets it, and the name of its column.
    most: the upper bound.
    of: Shape -> the quantity. It grows with n_layers, d_expert, n_exp and n_topk.
    label: description for tables and axes.
    estimate: whether the quantity is an estimate (a roofline) rather than a count.
  """

  field: str
  most: float
  of: Callable[[Shape], np.ndarray]
  label: str
  estimate: bool = False

  def text(self, value: float) -> str:
    """Formats a value of the quantity with its unit."""
    if self.field == "active_params":
      return short(value)
    return f"{value:.4g} {'GB' if self.field == MEMORY else 'ms'}"

  def flag(self, value: float) -> str:
    """Returns the flag that sets the budget to a value, rounded up so that the value fits."""
    if value <= 0 or not np.isfinite(value):
      return f"--{self.field}={value:g}"
    digits = 10.0**(np.floor(np.log10(value)) - 3)
    return f"--{self.field}={np.ceil(value / digits * (1 - 1e-12)) * digits:.4g}"


def budgets(serving: Serving, memory_gb: float, active_params: float | None = None,
            decode_ms: float | None = None,
            prefill_ms: float | None = None) -> tuple[Budget, ...]:
  """Returns the memory budget, then the inference budgets that are given."""
  found = [Budget(MEMORY, memory_gb, functools.partial(inference.memory_gb, serving=serving),
                  "memory, weights and cache (GB)")]
  if active_params is not None:
    found.append(Budget("active_params", active_params, lambda shape: shape.n_active,
                        "active parameters"))
  for field, most, of, label in (
      ("decode_ms", decode_ms, inference.decode_ms, "decode step (ms, estimate)"),
      ("prefill_ms", prefill_ms, inference.prefill_ms, "prefill (ms, estimate)")):
    if most is not None:
      found.append(Budget(field, most, functools.partial(of, serving=serving), label, True))
  return tuple(found)
