"""Three published models, as sources of budgets and as architectures to compare with.

Counts are those of moe_jax.arch.count on these shapes. Tests compare them with the published
numbers: totals to 0.5 %, active parameters to 2 % (a published "1.3B" is rounded, and it is not
always stated whether it includes the embedding).
"""

import dataclasses

from moe_jax.arch.architecture import Architecture
from moe_jax.errors import FieldError, did_you_mean


@dataclasses.dataclass(frozen=True)
class PublishedModel:
  """A model as it was published.

  Attributes:
    name: the authors' name for it.
    arch: its shape, as closely as Architecture can express it.
    tokens: training tokens.
    n_total: published total of all parameters.
    n_active: published active parameters.
    source: where these are published.
    note: how `arch` differs from the model.
  """

  name: str
  arch: Architecture
  tokens: float
  n_total: float
  n_active: float
  source: str
  note: str = ""


_MODELS = (
    PublishedModel(
        "OLMoE-1B-7B",
        Architecture(n_layers=16, d_model=2048, d_expert=1024, n_exp=64, n_topk=8, n_heads=16,
                     head_dim=128, vocab_size=50304),
        tokens=5.1e12, n_total=6.9e9, n_active=1.3e9,
        source="arXiv 2409.02060 (Muennighoff et al. 2024)",
        note="its query and key norms span all heads: 0.001 % more parameters than here"),
    PublishedModel(
        "Qwen3-30B-A3B",
        Architecture(n_layers=48, d_model=2048, d_expert=768, n_exp=128, n_topk=8, n_heads=32,
                     n_kv_heads=4, head_dim=128, vocab_size=151936),
        tokens=36e12, n_total=30.5e9, n_active=3.3e9,
        source="arXiv 2505.09388 (Yang et al. 2025)"),
    # Multi-head latent attention has 187.1M parameters per layer and caches 576 numbers per token
    # and layer. 100 query heads with 2 key-value heads, 128 wide, have 187.2M and cache 512.
    PublishedModel(
        "DeepSeek-V3",
        Architecture(n_layers=61, d_model=7168, d_expert=2048, n_exp=256, n_topk=8, n_heads=100,
                     n_kv_heads=2, head_dim=128, vocab_size=129280, n_shared_experts=1,
                     n_dense_layers=3, d_dense=18432),
        tokens=14.8e12, n_total=671e9, n_active=37e9,
        source="arXiv 2412.19437 (DeepSeek-AI 2024)",
        note="latent attention is modelled as grouped-query attention of the same size, 100 heads "
             "on 2: attention parameters 0.03 % more, cache 11 % less, attention FLOPs less; the "
             "multi-token-prediction module is left out"),
)

PUBLISHED: dict[str, PublishedModel] = {model.name: model for model in _MODELS}


def get_model(name: str) -> PublishedModel:
  """Returns the published model of that name, ignoring case. Raises FieldError if unknown."""
  for model in _MODELS:
    if model.name.lower() == name.lower():
      return model
  raise FieldError("like", name, did_you_mean(name, list(PUBLISHED)))
