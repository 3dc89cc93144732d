"""Routing statistics by layer and domain: load, entropy, drops, coactivation, specialization.

Specialization is measured as information: the share of the entropy of the expert choice that is
removed by knowing the domain of the text, or the token itself. Entropies are corrected for small
counts (Miller and Madow; Paninski 2003, eq. 4): without the correction, rare tokens would look
specialized.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from moe_jax.model.observed import Choices

_MOST_COUNTS = 2**28  # entries of token_LVE: 2 GiB of int64; a larger table is not counted


class RoutingCounts:
  """Routing counts summed over batches; G domains."""

  def __init__(self, n_domains: int, n_exp: int, vocab_size: int, first_layer: int = 0,
               keep: bool = False):
    """`keep` also stores the choices, for `agreement`: n_topk int16 per token and layer."""
    self._n_domains, self._n_exp, self._vocab_size = n_domains, n_exp, vocab_size
    self._first_layer, self._keep = first_layer, keep
    self._kept: list[np.ndarray] = []
    self._sums: dict[str, np.ndarray] = {}

  def add(self, choices: Choices, tokens_BS: np.ndarray, domain_BS: np.ndarray,
          mask_BS: np.ndarray) -> None:
    """Adds the tokens of a batch that are in `mask_BS`."""
    token_T, domain_T = tokens_BS[mask_BS], domain_BS[mask_BS]
    expert_LTK, dropped_LTK, entropy_LT = (np.asarray(x)[:, mask_BS] for x in choices)
    expert_LTK = expert_LTK.astype(np.int64)
    n_layers, _, n_topk = expert_LTK.shape
    g, e, v = self._n_domains, self._n_exp, self._vocab_size

    def count(layer_of, size, weights=None):
      return np.stack([np.bincount(layer_of(i).ravel(), minlength=size,
                                   weights=None if weights is None else weights(i).ravel())
                       for i in range(n_layers)])

    self._sum("tokens_G", np.bincount(domain_T, minlength=g))
    self._sum("load_LGE", count(lambda i: domain_T[:, None] * e + expert_LTK[i], g * e)
              .reshape(n_layers, g, e))
    self._sum("entropy_LG", count(lambda i: domain_T, g, lambda i: entropy_LT[i]))
    self._sum("dropped_LG", count(lambda i: np.repeat(domain_T, n_topk), g,
                                  lambda i: dropped_LTK[i]))
    self._sum("pair_LEE", np.stack([self._pairs(expert_TK) for expert_TK in expert_LTK]))
    if n_layers * v * e <= _MOST_COUNTS:
      self._sum("token_LVE", count(lambda i: token_T[:, None] * e + expert_LTK[i], v * e)
                .reshape(n_layers, v, e))
    if self._keep:
      self._kept.append(np.sort(expert_LTK, axis=-1).astype(np.int16))

  def _pairs(self, expert_TK: np.ndarray) -> np.ndarray:
    """Counts the tokens that two experts share, pair_EE.

    One matrix product, exact in float32, instead of counting n_topk^2 pairs per token.
    """
    n_tokens, e = len(expert_TK), self._n_exp
    place_TK = np.arange(n_tokens)[:, None] * e + expert_TK
    chosen_TE = np.bincount(place_TK.ravel(), minlength=n_tokens * e).reshape(n_tokens, e)
    chosen_TE = chosen_TE.astype(np.float32)
    return (chosen_TE.T @ chosen_TE).astype(np.int64)

  def _sum(self, name: str, value: np.ndarray) -> None:
    self._sums[name] = self._sums[name] + value if name in self._sums else value

  def agreement(self, final: "RoutingCounts") -> list[float]:
    """Returns the share of choices, by layer, that are also choices of `final` on the same text.

    This is OLMoE's router saturation (arXiv 2409.02060, section 5.1). Both must have `keep` set.
    """
    same_L, total = 0, 0
    for ours_LTK, theirs_LTK in zip(self._kept, final._kept, strict=True):
      same_LTK = (ours_LTK[..., None] == theirs_LTK[..., None, :]).any(-1)
      same_L, total = same_L + same_LTK.sum((1, 2)), total + same_LTK[0].size
    return (same_L / total).round(6).tolist()

  def result(self, labels: Sequence[str]) -> dict[str, Any]:
    """Returns the content of eval/routing.json: lists by layer and, for the first three, by domain.

    load: of each expert, over the mean load in the domain. entropy: nats per token. drop_rate:
    share of assignments. coactivation: share of the tokens of expert i (row) that also go to
    expert j; 1 on the diagonal, 0 for an expert that no token chose. domain_information: see
    above; None for a single domain. token_information: see above; None if there are too many
    counts (_MOST_COUNTS).
    """
    sums = self._sums
    load_LGE = sums["load_LGE"]
    assigned_LG = np.maximum(load_LGE.sum(-1), 1)
    own_LE = np.maximum(np.diagonal(sums["pair_LEE"], axis1=1, axis2=2), 1)
    found = {
        "load": load_LGE / assigned_LG[..., None] * self._n_exp,
        "entropy": sums["entropy_LG"] / np.maximum(sums["tokens_G"], 1),
        "drop_rate": sums["dropped_LG"] / assigned_LG,
        "coactivation": sums["pair_LEE"] / own_LE[..., None],
        "domain_information": _shares(load_LGE) if len(labels) > 1 else None,
        "token_information": _shares(sums["token_LVE"]) if "token_LVE" in sums else None}
    return {"layers": [self._first_layer + i for i in range(len(load_LGE))],
            "domains": list(labels), "tokens": sums["tokens_G"].tolist(),
            **{name: None if value is None else np.round(value, 6).tolist()
               for name, value in found.items()}}


def information_share(count_AE: np.ndarray) -> float:
  """I(A; E) / H(E) of a table of counts, corrected for small counts; from 0 to 1."""
  of_experts = _entropy(count_AE.sum(0))
  shared = _entropy(count_AE.sum(1)) + of_experts - _entropy(count_AE.ravel())
  return float(np.clip(shared / of_experts, 0, 1)) if of_experts > 0 else 0.0


def _shares(count_LAE: np.ndarray) -> np.ndarray:
  return np.array([information_share(count_AE) for count_AE in count_LAE])


def _entropy(count_N: np.ndarray) -> float:
  """Entropy in nats, with Miller and Madow's correction."""
  count_N, total = count_N[count_N > 0], count_N.sum()
  p_N = count_N / total
  return float(-(p_N * np.log(p_N)).sum() + (len(p_N) - 1) / (2 * total))
