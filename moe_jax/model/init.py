"""Initialisation: every scale in one place, with its source.

All matrices are normal with standard deviation 1/sqrt(fan_in), which keeps the variance of
activations through a layer whatever its width (LeCun et al. 1998), so that the cells of a
grid, which differ in width, start alike. On top of that:

* Depth. What a layer adds to the residual stream (attention output, feed-forward output)
  starts 1/sqrt(2 * n_layers) smaller, for there are 2 * n_layers such additions (GPT-2,
  Radford et al. 2019).
* Routed outputs. With normalised weights of about 1/n_topk each, the sum of n_topk independent
  expert outputs has 1/sqrt(n_topk) of the standard deviation of one. The experts' down
  projection starts sqrt(n_topk) larger, so that the routed output starts at the scale of a
  dense layer's and sparsity is not confounded with the residual scale. It is a factor of the
  initial weights and not of the forward pass (as DeepSeek-V3's routed scaling factor is), which
  therefore stays Qwen3-MoE's. Without normalisation the weights are about 1/n_exp, and the
  factor is n_exp / sqrt(n_topk).
* Router. Variance a tenth (Switch, arXiv 2101.03961, section 2.4): near-uniform at the start.
* Embedding: 1/sqrt(d_model), which is also right for a tied output head.
* Norm scales: 1.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.arch import Architecture


def residual_scale(arch: Architecture) -> float:
  """Factor of every matrix whose output is added to the residual stream."""
  return 1 / math.sqrt(2 * arch.n_layers)


def routed_scale(arch: Architecture, norm_topk_prob: bool) -> float:
  """Factor of the experts' down projection: undoes the shrinking by the router's weights."""
  typical_weight = 1 / arch.n_topk if norm_topk_prob else 1 / arch.n_exp
  return 1 / (typical_weight * math.sqrt(arch.n_topk))


def matrix(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str | None, ...], *,
           fan_in: int, scale: float = 1.0) -> nnx.Param:
  """A float32 weight, normal with standard deviation scale / sqrt(fan_in).

  `axes` are its logical axes, which mesh.RULES maps to the mesh.
  """
  std = scale / math.sqrt(fan_in)
  return nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32), axes=axes)


def ones(size: int) -> nnx.Param:
  """A float32 norm scale."""
  return nnx.Param(jnp.ones((size,), jnp.float32), axes=(None,))
