"""Zhao et al., arXiv 2509.23678: total, active parameters, tokens, active experts, shared ratio.

L = (e G + f / G + m S² + n S)(1 / N^alpha + k / Na^alpha + h Na / N)
    + a / N^alpha + b / D^beta + c / Na^alpha + epsilon.
"""

import numpy as np
from numpy.typing import ArrayLike

from moe_jax.laws.law import LOSS, Law, Variable, tokens_variable
from moe_jax.laws.shape import Shape


def loss(N: ArrayLike, Na: ArrayLike, D: ArrayLike, G: ArrayLike, S: ArrayLike) -> np.ndarray:
  """Loss from N total and Na active parameters, D tokens, G active experts, S shared fraction."""
  alpha = 0.2383
  experts = 0.1577 * G + 7.2446 / G + 5.1395 * S**2 - 3.2363 * S
  return (experts * (N**-alpha + 0.0013 * Na**-alpha + 0.0450 * Na / N)
          + 38.051 * N**-alpha + 27129.05 * D**-0.4694 + 31.096 * Na**-alpha + 1.8182)


def _n_experts_active(shape: Shape) -> np.ndarray:
  return np.add(shape.n_topk, shape.n_shared_experts)


ZHAO = Law(
    "zhao", "arXiv 2509.23678 (Zhao et al. 2025), from a secondary source", LOSS, loss,
    (Variable("N", "total parameters", ("n_total",), lambda shape, _: shape.n_total),
     Variable("Na", "active parameters", ("n_active",), lambda shape, _: shape.n_active),
     tokens_variable(),
     Variable("G", "active experts, including shared ones", ("n_topk",),
              lambda shape, _: _n_experts_active(shape)),
     Variable("S", "shared fraction of the active experts", ("n_shared_experts",),
              lambda shape, _: np.divide(shape.n_shared_experts, _n_experts_active(shape)))),
    caveat="the range that this law was fitted on is not recorded")
