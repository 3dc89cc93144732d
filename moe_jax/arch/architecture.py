"""The shape of an MoE decoder: the five variables of arXiv 2601.08215, and all others."""

import dataclasses
import numbers
from typing import Literal

from moe_jax.errors import require


@dataclasses.dataclass(frozen=True)
class Architecture:
  """A decoder-only transformer whose feed-forward layers are mixtures of SwiGLU experts.

  Widths are stored as integers and ratios (`granularity`, `sparsity`) are derived from them,
  so that a rounded shape is never reported with the ratios that were requested.

  Attributes:
    n_layers: depth l.
    d_model: width d.
    d_expert: hidden width of one expert.
    n_exp: routed experts per MoE layer. 1 makes a dense model.
    n_topk: experts each token is sent to.
    n_heads: query heads.
    n_kv_heads: key and value heads; None means n_heads (no grouped-query attention).
    head_dim: width of one head; None means d_model / n_heads.
    vocab_size: rows of the embedding table.
    n_shared_experts: experts that every token goes to, in addition to the routed ones.
    n_dense_layers: number of initial layers that are dense instead of MoE.
    d_dense: hidden width of these dense layers; None means the active width of an
      MoE layer, (n_topk + n_shared_experts) * d_expert.
    tie_embeddings: whether the output head is the embedding table.
    qk_norm: what queries and keys are normalized over: each `head` (Qwen3), the whole
      `projection` (OLMoE), or `none` (Mixtral).
  """

  n_layers: int
  d_model: int
  d_expert: int
  n_exp: int
  n_topk: int
  n_heads: int
  n_kv_heads: int | None = None
  head_dim: int | None = None
  vocab_size: int = 264
  n_shared_experts: int = 0
  n_dense_layers: int = 0
  d_dense: int | None = None
  tie_embeddings: bool = False
  qk_norm: Literal["head", "projection", "none"] = "head"

  def __post_init__(self):
    require(self.qk_norm in ("head", "projection", "none"), "qk_norm", self.qk_norm,
            "must be 'head', 'projection' or 'none'")
    for name in ("n_layers", "d_model", "d_expert", "n_exp", "n_topk", "n_heads",
                 "vocab_size"):
      value = getattr(self, name)
      require(isinstance(value, numbers.Integral), name, value, "must be a whole number")
      require(value >= 1, name, value, "must be at least 1")
    for name in ("n_kv_heads", "head_dim", "d_dense"):
      value = getattr(self, name)
      require(value is None or isinstance(value, numbers.Integral) and value >= 1, name, value,
              "must be at least 1, or none")
    for name in ("n_shared_experts", "n_dense_layers"):
      value = getattr(self, name)
      require(isinstance(value, numbers.Integral) and value >= 0, name, value, "must be 0 or more")
    require(self.n_topk <= self.n_exp, "n_topk", self.n_topk,
            f"must be at most n_exp, which is {self.n_exp}")
    require(self.n_dense_layers <= self.n_layers, "n_dense_layers", self.n_dense_layers,
            f"must be at most n_layers, which is {self.n_layers}")
    require(self.head_dim is not None or self.d_model % self.n_heads == 0,
            "d_model", self.d_model,
            f"must be a multiple of n_heads, which is {self.n_heads}, or head_dim be set")
    require(self.d_head % 2 == 0, "head_dim", self.d_head,
            "must be even: rotary embeddings turn pairs")
    require(self.n_heads % self.kv_heads == 0, "n_kv_heads", self.n_kv_heads,
            f"must divide n_heads, which is {self.n_heads}")

  @property
  def granularity(self) -> float:
    """g = d_model / d_expert; need not be an integer."""
    return self.d_model / self.d_expert

  @property
  def sparsity(self) -> float:
    """s = n_exp / n_topk."""
    return self.n_exp / self.n_topk

  @property
  def d_head(self) -> int:
    """Width h of one attention head, resolved."""
    return self.head_dim or self.d_model // self.n_heads

  @property
  def kv_heads(self) -> int:
    """Key and value heads, resolved."""
    return self.n_kv_heads or self.n_heads

  @property
  def dense_width(self) -> int:
    """Hidden width of a dense layer, resolved."""
    return self.d_dense or (self.n_topk + self.n_shared_experts) * self.d_expert

  @property
  def qk_norm_scales(self) -> int:
    """Number of norm scales of a layer's queries and keys."""
    return {"head": 2, "projection": self.n_heads + self.kv_heads, "none": 0}[
        self.qk_norm] * self.d_head

  @property
  def n_moe_layers(self) -> int:
    """Number of layers with experts and a router."""
    return self.n_layers - self.n_dense_layers
