"""Fine-grained MoE, arXiv 2402.07871: L = c + (gamma0 / G^gamma + a) / N^alpha + b / D^beta.

N is the TOTAL number of non-embedding parameters, d² (8 E + 4) n_blocks with expansion rate
E: at E = 64 it is 43 times the active ones, 12 d² n_blocks, not 64 times.
G = 4 d_model / d_expert is both the number of experts that one standard feed-forward layer is
split into and the number of experts each token is routed to.
"""

import numpy as np
from numpy.typing import ArrayLike

from moe_jax.laws.law import LOSS, Assumption, Law, Variable, tokens_variable

_SOURCE = "arXiv 2402.07871 (Krajewski et al. 2024), rounded coefficients"


def loss(N: ArrayLike, D: ArrayLike, G: ArrayLike) -> np.ndarray:
  """Loss at expansion rate 64 from N total non-embedding parameters, D tokens, granularity G."""
  return 0.47 + (2.1 / G**0.58 + 18.1) / N**0.115 + 30.8 / D**0.147


def dense_loss(N: ArrayLike, D: ArrayLike) -> np.ndarray:
  """Loss of the dense models of the same paper."""
  return 0.47 + 16.3 / N**0.126 + 26.7 / D**0.127


def _close(x: ArrayLike, y: ArrayLike) -> np.ndarray:
  return np.abs(np.asarray(x, float) - y) <= 0.05 * np.asarray(y)


_D = tokens_variable(16e9, 130e9)
_N = Variable("N", "total parameters without embeddings", ("n_total",),
              lambda shape, _: shape.n_total, 129e6, 3.7e9)

KRAJEWSKI = Law(
    "krajewski", _SOURCE, LOSS, loss,
    (_N, _D, Variable("G", "4 d_model / d_expert", ("granularity",),
                      lambda shape, _: 4 * shape.granularity, 1, 16)),
    (Assumption("sparsity 64", lambda shape: _close(shape.sparsity, 64)),
     Assumption("n_topk = 4 d_model / d_expert",
                lambda shape: _close(shape.n_topk, 4 * shape.granularity))))

KRAJEWSKI_DENSE = Law(
    "krajewski-dense", _SOURCE, LOSS, dense_loss, (_N, _D),
    (Assumption("dense models", lambda shape: np.equal(shape.n_exp, 1)),))
