"""FLAME-MoE, arXiv 2505.20225: loss from active parameters and tokens at 64 experts, top-8.

Its A and B are exp(5) and exp(15), starting values of the fit's grid: they were never optimized.
"""

import numpy as np
from numpy.typing import ArrayLike

from moe_jax.laws.law import LOSS, Assumption, Law, Variable, tokens_variable


def loss(N: ArrayLike, D: ArrayLike) -> np.ndarray:
  """Loss from N active parameters and D tokens."""
  return 2.241716 + 148.413257 / N**0.279702 + 3269017.372472 / D**0.7155


FLAME_MOE = Law(
    "flame-moe", "arXiv 2505.20225 (Kang et al. 2025)", LOSS, loss,
    (Variable("N", "active parameters", ("n_active",), lambda shape, _: shape.n_active,
              38e6, 1.7e9),
     tokens_variable()),
    (Assumption("n_exp 64 and n_topk 8",
                lambda shape: np.equal(shape.n_exp, 64) & np.equal(shape.n_topk, 8)),),
    caveat="its A and B equal the starting values of the published fit: they were never "
           "optimized")
