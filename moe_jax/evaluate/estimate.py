"""Means per token or byte, with standard errors over documents."""

from typing import NamedTuple

import numpy as np


class Estimate(NamedTuple):
  """A ratio and its standard error, which is None for a single document."""

  value: float
  se: float | None

  def scaled(self, factor: float) -> "Estimate":
    return Estimate(self.value * factor, None if self.se is None else self.se * factor)


def ratio(total_D: np.ndarray, size_D: np.ndarray) -> Estimate:
  """Estimates R = sum of totals / sum of sizes, with documents as the independent samples.

  Tokens of one document are correlated, so the error of a loss per token comes from the choice of
  documents, which differ in size. Linearized variance of the ratio estimator (Cochran, Sampling
  Techniques, 3rd ed., section 2.11, without finite-population correction):

      se(R)^2 = D / (D - 1) * sum_d (total_d - R size_d)^2 / (sum_d size_d)^2

  Args:
    total_D: numerator of each document, e.g. nats.
    size_D: denominator of each document, e.g. targets or bytes.
  """
  size = size_D.sum()
  value = total_D.sum() / size
  n_documents = len(size_D)
  if n_documents < 2:
    return Estimate(float(value), None)
  squares = ((total_D - value * size_D) ** 2).sum()
  se = np.sqrt(squares * n_documents / (n_documents - 1)) / size
  return Estimate(float(value), float(se))
