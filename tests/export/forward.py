"""Our own forward pass, as the tests here compare it."""

import jax
import numpy as np

from moe_jax.mesh import make_mesh
from moe_jax.model import functional


def outputs(config, params, tokens_BS):
  """(logits_BSV, balance loss as transformers counts it), dropless, each row one document."""
  mesh = make_mesh(config, jax.devices()[:1])
  tokens_BS = np.asarray(tokens_BS, np.int32)
  logits_BSV, sums = jax.jit(lambda params, tokens_BS: functional.apply(
      config, params, tokens_BS, 0 * tokens_BS, mesh))(params, tokens_BS)
  assigned_E, prob_E = (np.asarray(x, float).sum(0) for x in (sums.assigned_E, sums.prob_E))
  n_tokens = float(sums.tokens.sum())
  return np.asarray(logits_BSV), config.arch.n_exp * (
      assigned_E / n_tokens * prob_E / n_tokens).sum(), np.asarray(sums.assigned_E)
