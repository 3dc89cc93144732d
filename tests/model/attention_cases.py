"""What the ways of attention are compared by."""

from collections.abc import Callable, Sequence

import jax
import numpy as np


def require_equal(ours: Callable, truth: Callable, arrays: Sequence[jax.Array],
                  segments_BS: jax.Array | None, weight_BSHh: jax.Array, tolerance: float) -> None:
  """Outputs, and the gradients of queries, keys and values of their sum by weight. The gradients
  may differ by ten times as much."""
  def run(attention):
    def loss(*arrays):
      out = attention(*arrays, segments_BS)
      return (out * weight_BSHh).sum(), out
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(*arrays)

  (_, out), grads = run(ours)
  (_, true_out), true_grads = run(truth)
  np.testing.assert_allclose(out, true_out, rtol=tolerance, atol=tolerance)
  for grad, true_grad in zip(grads, true_grads, strict=True):
    np.testing.assert_allclose(grad, true_grad, rtol=10 * tolerance, atol=10 * tolerance)
