"""Published rules that are no laws of the loss: learning rate, batch, FLOPs at equal loss."""

import numpy as np
from numpy.typing import ArrayLike

# Kimi K2, arXiv 2507.20534: how many times the FLOPs of sparsity 48 other sparsities need
# for the same loss of 1.5.
KIMI_K2_FLOPS_RATIO = {8: 1.69, 16: 1.39, 32: 1.15, 48: 1.0}


def joint_moe_learning_rate(n_active: ArrayLike, n_exp: ArrayLike) -> np.ndarray:
  """exp(8.39 - 0.81 ln N_active - 0.25 ln E). Source: arXiv 2502.05172."""
  return np.exp(8.39 - 0.81 * np.log(n_active) - 0.25 * np.log(n_exp))


def step_law_learning_rate(n_parameters: ArrayLike, tokens: ArrayLike) -> np.ndarray:
  """1.79 N^-0.713 D^0.307. Source: Step Law, arXiv 2503.04715, second hand."""
  return 1.79 * np.asarray(n_parameters, float)**-0.713 * np.asarray(tokens, float)**0.307


def step_law_batch_tokens(tokens: ArrayLike) -> np.ndarray:
  """0.58 D^0.571 tokens a batch. Source: Step Law, arXiv 2503.04715, second hand."""
  return 0.58 * np.asarray(tokens, float)**0.571


def same_order_as_kimi_k2(flops_ratio: dict[int, float]) -> bool:
  """Whether a law's own ratios, sparsity -> FLOPs at equal loss, rank the sparsities alike."""
  shared = [s for s in KIMI_K2_FLOPS_RATIO if s in flops_ratio]
  return (sorted(shared, key=flops_ratio.__getitem__)
          == sorted(shared, key=KIMI_K2_FLOPS_RATIO.__getitem__))
