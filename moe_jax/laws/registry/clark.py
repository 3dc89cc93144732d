"""Clark et al., arXiv 2202.01169, routed by S-BASE: bilinear in log N and log experts.

log10 L = a log10 N + b log10 E + c log10 N log10 E + d, with E the saturated number of experts,
at one training length. The coefficients are rounded too much to reproduce the paper's cut-offs.
"""

import numpy as np
from numpy.typing import ArrayLike

from moe_jax.laws.law import LOSS, Assumption, Law, Variable
from moe_jax.laws.registry.saturation import saturated

E_START, E_MAX = 1.847, 314.478


def loss(N: ArrayLike, E: ArrayLike) -> np.ndarray:
  """Loss from N parameters of the dense base model and E experts, one of them active."""
  log_e = np.log10(saturated(E, 1, E_START, E_MAX))
  log_n = np.log10(N)
  return 10**(-0.082 * log_n - 0.108 * log_e + 0.009 * log_n * log_e + 1.104)


CLARK = Law(
    "clark", "arXiv 2202.01169 (Clark et al. 2022), S-BASE, from a secondary source", LOSS, loss,
    (Variable("N", "size of the base model: active parameters", ("n_active",),
              lambda shape, _: shape.n_active),
     Variable("E", "experts per active expert, n_exp / n_topk", ("sparsity",),
              lambda shape, _: shape.sparsity)),
    (Assumption("n_topk 1", lambda shape: np.equal(shape.n_topk, 1)),),
    caveat="it was fitted at one training length and does not depend on tokens; its fitted "
           "ranges are not recorded")
