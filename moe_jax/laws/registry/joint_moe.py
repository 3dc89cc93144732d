"""Joint MoE, arXiv 2502.05172: loss from active parameters, tokens and number of experts.

L = 35.91 / (E^.2285 N^(.1889 - .0098 ln E)) + 35.98 / (E^-.5529 D^(.1775 + .0259 ln E))
    + 1.3637, with E the saturated number of experts. Copies in circulation have lost the fraction
bars; this formula restores them and was checked against the paper's nine optima.
"""

import numpy as np
from numpy.typing import ArrayLike

from moe_jax.laws.law import LOSS, Assumption, Law, Variable, tokens_variable
from moe_jax.laws.registry.saturation import saturated

E_START, E_MAX = 2.07, 290.45


def loss(N: ArrayLike, D: ArrayLike, E: ArrayLike) -> np.ndarray:
  """Loss from N active non-embedding parameters, D tokens and E experts with top-1 routing."""
  hat = saturated(E, 1, E_START, E_MAX)
  log_hat = np.log(hat)
  return (35.91 / (hat**0.2285 * N**(0.1889 - 0.0098 * log_hat))
          + 35.98 / (hat**-0.5529 * D**(0.1775 + 0.0259 * log_hat)) + 1.3637)


JOINT_MOE = Law(
    "joint-moe", "arXiv 2502.05172 (Ludziejewski et al. 2025), repaired from a secondary source",
    LOSS, loss,
    (Variable("N", "active parameters without embeddings", ("n_active",),
              lambda shape, _: shape.n_active, None, 2.7e9),
     tokens_variable(),
     Variable("E", "experts per active expert, n_exp / n_topk", ("sparsity",),
              lambda shape, _: shape.sparsity, 1, 32)),
    (Assumption("n_topk 1", lambda shape: np.equal(shape.n_topk, 1)),
     Assumption("n_total up to 5e9", lambda shape: shape.n_total <= 5e9)))
