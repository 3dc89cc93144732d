"""Initialization: every scale in one place, with its source.

All matrices are normal with standard deviation 1/sqrt(fan_in), which preserves the variance of
activations through a layer of any width (LeCun et al. 1998): the cells of a grid differ
in width. In addition:

* Depth. What a layer adds to the residual stream (attention output, feed-forward output)
  is scaled down by 1/sqrt(2 * n_layers), since there are 2 * n_layers such additions (GPT-2,
  Radford et al. 2019).
* Routed outputs. A sum of independent expert outputs with weights w has |w| times the standard
  deviation of one of them: with normalized weights about 1/sqrt(n_topk). The experts' down
  projection is scaled up by 1/|w|, with the weights w expected at initialization, so that the
  routed output starts at the scale of a dense layer's and sparsity is not confounded with the
  residual scale. The factor is in the initial weights and not in the forward pass (unlike
  DeepSeek-V3's routed scaling factor), which stays Qwen3-MoE's. Without normalization the factor
  of a softmax is large, nearly n_exp / sqrt(n_topk), and the output grows as the router
  sharpens: one more reason to normalize.
* Router. A tenth of the variance (Switch, arXiv 2101.03961, section 2.4): near-uniform at first.
* Embedding. 1/sqrt(d_model), as in nanodo, which also suits a tied output head. So a token
  enters the residual stream with norm 1 at any width. The entries of what layers add have the same
  size at any width, so these additions weigh more in a wider model.
* Norm scales. 1.
"""

import math
import statistics

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.arch import Architecture
from moe_jax.config import MoEConfig

ROUTER_SCALE = 0.1**0.5


def residual_scale(arch: Architecture) -> float:
  """Scale of every matrix whose output is added to the residual stream."""
  return 1 / math.sqrt(2 * arch.n_layers)


def routed_scale(arch: Architecture, moe: MoEConfig) -> float:
  """Scale of the experts' down projection: 1 / |w| of the weights expected at initialization.

  At initialization, logits are normal with the router's standard deviation; the i-th largest of n
  is near the quantile (n - i + 5/8) / (n + 1/4) (Blom 1958).
  """
  n_exp, normal = arch.n_exp, statistics.NormalDist(0, ROUTER_SCALE)
  logit_E = [normal.inv_cdf((n_exp - i + 0.625) / (n_exp + 0.25)) for i in range(1, n_exp + 1)]
  if moe.router == "sigmoid":
    score_E, total = [1 / (1 + math.exp(-logit)) for logit in logit_E], 1.0
  else:
    score_E = [math.exp(logit) for logit in logit_E]
    total = sum(score_E)
  chosen_K = score_E[:arch.n_topk]
  return (sum(chosen_K) if moe.norm_topk_prob else total) / math.hypot(*chosen_K)


def matrix(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str | None, ...], *,
           fan_in: int, scale: float = 1.0) -> nnx.Param:
  """A float32 weight, normal with standard deviation scale / sqrt(fan_in).

  `axes` are its logical axes, which mesh.RULES maps to mesh axes.
  """
  std = scale / math.sqrt(fan_in)
  return nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32), axes=axes)


def ones(*shape: int) -> nnx.Param:
  """A float32 norm scale."""
  return nnx.Param(jnp.ones(shape, jnp.float32), axes=(None,) * len(shape))
