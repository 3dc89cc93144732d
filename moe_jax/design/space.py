"""Defines the architectures that a search covers: a lattice of hardware-friendly integers.

    d_model    multiples of `multiple`, 4 % or one multiple apart, whichever is more
    n_layers   whole numbers, 4 % or 1 apart, with d_model / n_layers in the range `aspect`
    d_expert   multiples of `multiple`, 8 % or one multiple apart, with d_model / d_expert in
               the range `granularity`
    n_exp      powers of two and three times powers of two
    n_topk     1, 2, 3, 4, 6, 8, 12, ... up to half of n_exp

The rest comes from a template Architecture: shared experts, dense first layers (with the active
width of an MoE layer), vocabulary, tied embeddings, head width and number of key-value heads
(None: as many as query heads). The number of query heads grows with d_model: it keeps the
template's n_heads * d_head / d_model, rounded to whole groups.
"""

import dataclasses
import math

import numpy as np
from numpy.typing import ArrayLike

from moe_jax.arch.architecture import Architecture
from moe_jax.errors import FieldError, require
from moe_jax.laws.shape import Shape

# OLMoE's padded vocabulary of the GPT-NeoX tokenizer.
DEFAULT_VOCAB = 50304
DEFAULT_TEMPLATE = Architecture(n_layers=1, d_model=128, d_expert=128, n_exp=1, n_topk=1,
                                n_heads=1, head_dim=128, vocab_size=DEFAULT_VOCAB)

_STEP, _EXPERT_STEP = 1.04, 1.08
_MOST_WIDTH = 16384
VARIABLES = ("n_layers", "d_model", "d_expert", "n_exp", "n_topk")


@dataclasses.dataclass(frozen=True)
class Space:
  """The search space; see the module's docstring.

  Attributes:
    template: provides everything in the architecture that is not searched.
    experts: range of n_exp.
    topk: range of n_topk.
    multiple: d_model and d_expert are multiples of it. 128 fills the lanes of a TPU.
    aspect: range of d_model / n_layers.
    granularity: range of d_model / d_expert.
  """

  template: Architecture = DEFAULT_TEMPLATE
  experts: tuple[float, float] = (8, 512)
  topk: tuple[float, float] = (1, 32)
  multiple: int = 128
  aspect: tuple[float, float] = (32.0, 128.0)
  granularity: tuple[float, float] = (0.5, 16.0)

  def __post_init__(self):
    require(bool(self.expert_counts()), "experts", _text(self.experts),
            f"contains no power of two up to {2**16} and no three times a power of two")
    require(bool(self.routings()), "topk", _text(self.topk), "contains none of 1, 2, 3, 4, "
            f"6, 8, 12, ... up to half of --experts={_text(self.experts)}")
    require(8 <= self.multiple <= 4096, "multiple", self.multiple,
            "must lie between 8 and 4096")
    if not len(self.shapes()[0]):
      raise FieldError("aspect", _text(self.aspect), f"allows no shape with "
                       f"granularity {_text(self.granularity)} and multiples of "
                       f"{self.multiple}: widen one of them")

  def expert_counts(self) -> list[int]:
    """Returns all n_exp, ascending."""
    return _powers(*self.experts)

  def routings(self) -> dict[int, list[int]]:
    """Returns n_exp -> all its n_topk, both ascending."""
    low, high = self.topk
    found = {n_exp: _powers(low, min(high, max(1, n_exp // 2)))
             for n_exp in self.expert_counts()}
    return {n_exp: topks for n_exp, topks in found.items() if topks}

  def shapes(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns all (n_layers, d_model, d_expert), int64 [n] each."""
    found = []
    for d_model in lattice(self.multiple, _MOST_WIDTH, self.multiple, _STEP):
      layers = lattice(max(d_model / self.aspect[1], self.template.n_dense_layers + 1),
                       d_model / self.aspect[0], 1, _STEP)
      widths = lattice(d_model / self.granularity[1], d_model / self.granularity[0],
                       self.multiple, _EXPERT_STEP)
      l_LF, f_LF = np.meshgrid(layers, widths, indexing="ij")
      found.append(np.stack([l_LF.ravel(), np.full(l_LF.size, d_model), f_LF.ravel()]))
    return tuple(np.concatenate(found, axis=1).astype(np.int64))

  def shape(self, n_layers: ArrayLike, d_model: ArrayLike, d_expert: ArrayLike,
            n_exp: ArrayLike, n_topk: ArrayLike) -> Shape:
    """Returns shapes with these five variables and the rest of the template. Arrays broadcast."""
    template = self.template
    group = template.n_kv_heads or 1
    per_width = template.n_heads * template.d_head / template.d_model
    groups = np.rint(np.asarray(d_model) * per_width / (template.d_head * group))
    n_heads = group * np.maximum(1, groups).astype(np.int64)
    return Shape(
        n_layers=n_layers, d_model=d_model, d_expert=d_expert, n_exp=n_exp, n_topk=n_topk,
        n_heads=n_heads, n_kv_heads=template.n_kv_heads or n_heads,
        head_dim=template.d_head, vocab_size=template.vocab_size,
        n_shared_experts=template.n_shared_experts, n_dense_layers=template.n_dense_layers,
        tie_embeddings=template.tie_embeddings, qk_norm=template.qk_norm)

  def architecture(self, n_layers: int, d_model: int, d_expert: int, n_exp: int,
                   n_topk: int) -> Architecture:
    """Like `shape`, for a single Architecture."""
    shape = self.shape(n_layers, d_model, d_expert, n_exp, n_topk)
    whole = {name: int(value) for name, value in vars(shape).items()
             if value is not None and name not in ("tie_embeddings", "qk_norm")}
    return Architecture(**whole, tie_embeddings=self.template.tie_embeddings,
                        qk_norm=self.template.qk_norm)

  def edges(self, arch: Architecture) -> tuple[str, ...]:
    """Returns, as text, the variables in which an architecture is at an end of its range."""
    found = []
    for name, value, (low, high) in (
        ("n_exp", arch.n_exp, self.experts), ("n_topk", arch.n_topk, self.topk),
        ("d_model / n_layers", arch.d_model / arch.n_layers, self.aspect),
        ("granularity", arch.granularity, self.granularity)):
      if value <= 1.03 * low or value >= high / 1.03:
        found.append(f"{name} {value:.3g}")
    return tuple(found)


def lattice(low: float, high: float, multiple: int, step: float) -> np.ndarray:
  """Returns multiples within [low, high], thinned to be a factor of about `step` apart, [n]."""
  first, last = max(1, math.ceil(low / multiple - 1e-9)), math.floor(high / multiple + 1e-9)
  if last < first:
    return np.zeros(0, np.int64)
  n_points = math.ceil(math.log(last / first) / math.log(step)) + 1
  return multiple * np.unique(np.rint(np.geomspace(first, last, n_points)).astype(np.int64))


def _powers(low: float, high: float) -> list[int]:
  """Returns those of 1, 2, 3, 4, 6, 8, 12, ... in the range, up to 2^16."""
  found = [2**k for k in range(17)] + [3 * 2**k for k in range(15)]
  return sorted(n for n in found if low <= n <= high)


def _text(ends: tuple[float, float]) -> str:
  return f"{ends[0]:g}:{ends[1]:g}"
