"""Sampling settings. No JAX."""

import dataclasses
import math

from moe_jax.errors import require


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How the next token is chosen.

  Attributes:
    temperature: 0 takes the most likely token; 1 draws from the model's distribution.
    top_k: draws only from the top_k most likely tokens; 0 from all.
    top_p: draws only from the smallest set of tokens whose probabilities sum to at least this.
    seed: random seed of the draws.
  """

  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0
  seed: int = 0

  def __post_init__(self):
    require(0 <= self.temperature < math.inf, "temperature", self.temperature,
            "must be 0 (the likeliest token) or more")
    require(self.top_k >= 0, "top_k", self.top_k, "must be 0 (all tokens) or more")
    require(0 < self.top_p <= 1, "top_p", self.top_p, "must be above 0 and at most 1")
    require(0 <= self.seed < 2**31, "seed", self.seed, "must be at least 0 and below 2^31")
