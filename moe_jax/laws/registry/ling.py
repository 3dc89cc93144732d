"""Ling, arXiv 2507.17702: the efficiency leverage of an MoE over a dense model.

EL = A^(a + d log10 C + gamma (log2 G)² + beta log2 G), with A the saturated activation ratio. The
bases of the logarithms are inferred: with these, EL(3.1 %, 12, 1e22) is 7.245 (paper: above 7).
An EL of 7 means that a dense model needs 7 times the FLOPs for the same loss: more is better.
"""

import numpy as np
from numpy.typing import ArrayLike

from moe_jax.laws.law import LEVERAGE, Law, Training, Variable
from moe_jax.laws.registry.saturation import saturated
from moe_jax.laws.shape import Shape


def leverage(A: ArrayLike, G: ArrayLike, C: ArrayLike) -> np.ndarray:
  """EL from activation ratio A in (0, 1], G = 2 d_model / d_expert and C training FLOPs."""
  log_g = np.log2(G)
  exponent = 1.23 - 0.0761 * np.log10(C) + 0.0167 * log_g**2 - 0.117 * log_g
  return saturated(A, 0, 0.0163, 5.28e16)**exponent


def _activation(shape: Shape) -> np.ndarray:
  return np.divide(np.add(shape.n_topk, shape.n_shared_experts),
                   np.add(shape.n_exp, shape.n_shared_experts))


def _flops(shape: Shape, training: Training) -> np.ndarray:
  if training.flops is not None:
    return np.asarray(training.flops, float)
  return 6 * shape.n_active * training.tokens


LING = Law(
    "ling", "arXiv 2507.17702 (Ling Team 2025), log bases inferred", LEVERAGE, leverage,
    (Variable("A", "active fraction of the experts, both counts including shared ones",
              ("n_topk", "n_exp", "n_shared_experts"), lambda shape, _: _activation(shape)),
     Variable("G", "2 d_model / d_expert", ("granularity",),
              lambda shape, _: 2 * shape.granularity),
     Variable("C", "training FLOPs", ("flops",), _flops)),
    caveat="over 300 models of up to 28e9 parameters; the fitted ranges of A, G and C "
           "are not recorded")
