"""Chinchilla, arXiv 2203.15556, and its replication, 2404.10102: L = E + A/N^a + B/D^b.

Laws of dense models: for an MoE they see only the active parameters and the embeddings, not the
inactive experts.
"""

import functools

import numpy as np
from numpy.typing import ArrayLike

from moe_jax.laws.law import LOSS, Assumption, Law, Variable, tokens_variable

# Compute-optimal training uses about this many tokens per parameter. Far below that, architectures
# differ in how fast they start to learn, not in what they can learn.
TOKENS_PER_PARAMETER = 20


def loss(N: ArrayLike, D: ArrayLike, A: float, B: float, E: float, alpha: float,
         beta: float) -> np.ndarray:
  """Loss from N parameters, including embeddings, and D tokens."""
  return E + A / N**alpha + B / D**beta


_VARIABLES = (
    Variable("N", "parameters used per token, including embeddings", ("n_active", "vocab_size"),
             lambda shape, _: shape.n_active_with_embedding, 70e6, 16e9),
    tokens_variable(5e9, 500e9))
_DENSE = (Assumption("dense models", lambda shape: np.equal(shape.n_exp, 1)),)

CHINCHILLA = Law(
    "chinchilla", "arXiv 2203.15556 (Hoffmann et al. 2022), approach 3", LOSS,
    functools.partial(loss, A=406.4, B=410.7, E=1.69, alpha=0.34, beta=0.28), _VARIABLES, _DENSE)

BESIROGLU = Law(
    "besiroglu", "arXiv 2404.10102 (Besiroglu et al. 2024), the replication", LOSS,
    functools.partial(loss, A=482.01, B=2085.43, E=1.8172, alpha=0.3478, beta=0.3658),
    _VARIABLES, _DENSE)
