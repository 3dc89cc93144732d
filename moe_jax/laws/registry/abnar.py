"""Abnar et al., arXiv 2501.12370: total parameters, tokens and sparsity S = (E - K) / E.

L = a / N^alpha + b / D^beta + c / (1-S)^lambda + d / ((1-S)^delta N^gamma) + e.
R² is 99 % on the fitted points and 68 % on those held out.
"""

import numpy as np
from numpy.typing import ArrayLike

from moe_jax.laws.law import LOSS, Law, Variable, tokens_variable


def loss(N: ArrayLike, D: ArrayLike, S: ArrayLike) -> np.ndarray:
  """Loss from N total parameters, D tokens and S, the inactive fraction of the experts (< 1)."""
  active = 1 - S
  return (16612.5 / N**0.5962 + 5455.67 / D**0.3954 + 0.4598 / active**-0.1666
          + 17.26 / (active**0.1603 * N**0.1595) + 0.94)


ABNAR = Law(
    "abnar", "arXiv 2501.12370 (Abnar et al. 2025), from a secondary source", LOSS, loss,
    (Variable("N", "total parameters", ("n_total",), lambda shape, _: shape.n_total),
     tokens_variable(),
     Variable("S", "inactive fraction of the experts, (n_exp - n_topk) / n_exp", ("sparsity",),
              lambda shape, _: 1 - 1 / shape.sparsity, 0, 0.98)),
    caveat="R² 68 % on held-out points; the fitted ranges of N and D are not recorded")
