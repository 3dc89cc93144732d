import pytest

from moe_jax.arch import count
from moe_jax.design.published import PUBLISHED, get_model
from moe_jax.design.space import VARIABLES, Space
from moe_jax.errors import FieldError


@pytest.mark.parametrize("model", PUBLISHED.values(), ids=PUBLISHED)
def test_counts_are_the_published_ones(model):
  assert count.n_total_with_embedding(model.arch) == pytest.approx(model.n_total, rel=0.005)
  assert count.n_active_with_embedding(model.arch) == pytest.approx(model.n_active, rel=0.02)


def test_latent_attention_stands_as_grouped_queries_of_its_size():
  # Projections down and up of queries, keys and values, and out, with two norms:
  d, heads, rank_q, rank_kv, rope, nope, v = 7168, 128, 1536, 512, 64, 128, 128
  latent = (d * rank_q + rank_q * heads * (nope + rope) + d * (rank_kv + rope)
            + rank_kv * heads * (nope + v) + heads * v * d + rank_q + rank_kv)
  arch = PUBLISHED["DeepSeek-V3"].arch
  ours = 2 * d * (arch.n_heads + arch.kv_heads) * arch.d_head + 2 * arch.d_head
  assert ours == pytest.approx(latent, rel=5e-4)
  cached = count.kv_cache_bytes(arch, 1, 1, "int8") / arch.n_layers
  assert cached == pytest.approx(rank_kv + rope, rel=0.12)


@pytest.mark.parametrize("model", PUBLISHED.values(), ids=PUBLISHED)
def test_a_space_like_a_model_holds_the_model_as_it_is(model):
  space = Space(template=model.arch)
  same = space.architecture(*(getattr(model.arch, name) for name in VARIABLES))
  assert count.n_total_with_embedding(same) == count.n_total_with_embedding(model.arch)
  assert count.n_active(same) == count.n_active(model.arch)
  assert (same.n_heads, same.kv_heads, same.d_head) == (
      model.arch.n_heads, model.arch.kv_heads, model.arch.d_head)


def test_names_in_any_case_and_the_nearest_of_unknown_ones():
  assert get_model("olmoe-1b-7b") is PUBLISHED["OLMoE-1B-7B"]
  with pytest.raises(FieldError, match="did you mean 'DeepSeek-V3'"):
    get_model("DeepSeek-V4")
