"""Describes the shapes of many models at once: an Architecture whose fields are arrays."""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from moe_jax.arch import count
from moe_jax.arch.architecture import Architecture


@dataclasses.dataclass(frozen=True)
class Shape:
  """The fields of an Architecture, each a scalar or an array; all broadcast together.

  Fields are not validated, because a search builds millions of shapes. Parameter counts are the
  exact ones of moe_jax.arch.count, computed on first access.
  """

  n_layers: ArrayLike
  d_model: ArrayLike
  d_expert: ArrayLike
  n_exp: ArrayLike
  n_topk: ArrayLike
  n_heads: ArrayLike = 4
  n_kv_heads: ArrayLike | None = None
  head_dim: ArrayLike | None = None
  vocab_size: ArrayLike = 264
  n_shared_experts: ArrayLike = 0
  n_dense_layers: ArrayLike = 0
  d_dense: ArrayLike | None = None
  tie_embeddings: ArrayLike = False
  qk_norm: ArrayLike = "head"

  @classmethod
  def of(cls, archs: Architecture | Sequence[Architecture]) -> "Shape":
    """Builds the shape of one architecture (scalars) or of several (arrays [n])."""
    if isinstance(archs, Architecture):
      return cls(**_resolved(archs))
    rows = [_resolved(arch) for arch in archs]
    return cls(**{name: np.array([row[name] for row in rows]) for name in rows[0]})

  @property
  def granularity(self) -> np.ndarray:
    return np.divide(self.d_model, self.d_expert)

  @property
  def sparsity(self) -> np.ndarray:
    return np.divide(self.n_exp, self.n_topk)

  @property
  def d_head(self) -> ArrayLike:
    return self.head_dim if self.head_dim is not None else np.divide(self.d_model, self.n_heads)

  @property
  def kv_heads(self) -> ArrayLike:
    return self.n_kv_heads if self.n_kv_heads is not None else self.n_heads

  @property
  def qk_norm_scales(self) -> ArrayLike:
    of_head, of_projection = (np.equal(self.qk_norm, way) for way in ("head", "projection"))
    return np.multiply(np.where(of_head, 2, np.where(
        of_projection, np.add(self.n_heads, self.kv_heads), 0)), self.d_head)

  @property
  def dense_width(self) -> ArrayLike:
    if self.d_dense is not None:
      return self.d_dense
    return np.multiply(np.add(self.n_topk, self.n_shared_experts), self.d_expert)

  @property
  def n_moe_layers(self) -> np.ndarray:
    return np.subtract(self.n_layers, self.n_dense_layers)

  @functools.cached_property
  def n_total(self) -> np.ndarray:
    """N_total: parameters without the embedding and the output head."""
    return np.asarray(count.n_total(self), float)

  @functools.cached_property
  def n_active(self) -> np.ndarray:
    """N_active: the part of N_total that one token uses."""
    return np.asarray(count.n_active(self), float)

  @functools.cached_property
  def n_active_with_embedding(self) -> np.ndarray:
    tables = np.where(self.tie_embeddings, 1, 2)
    return self.n_active + tables * np.multiply(self.vocab_size, self.d_model)


def _resolved(arch: Architecture) -> dict:
  return dataclasses.asdict(arch) | {
      "n_kv_heads": arch.kv_heads, "head_dim": arch.d_head, "d_dense": arch.dense_width}
