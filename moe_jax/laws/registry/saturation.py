"""The saturating transform shared by the Clark, joint MoE and Ling laws."""

import numpy as np
from numpy.typing import ArrayLike


def saturated(x: ArrayLike, offset: float, start: float, top: float) -> np.ndarray:
  """x^ with 1 / x^ = 1 / (x - offset + (1/start - 1/top)^-1) + 1 / top.

  It equals `start` at x = offset and tends to `top`. Source: arXiv 2202.01169.
  """
  return 1 / (1 / (np.asarray(x, float) - offset + 1 / (1 / start - 1 / top)) + 1 / top)
