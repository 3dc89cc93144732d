"""What a layout cannot express is refused by the field's name, in both directions."""

import pytest

from moe_jax.config import ModelConfig
from moe_jax.errors import FieldError
from moe_jax.export import layouts
from moe_jax.export.layouts import LAYOUTS, config_json, from_config_json, layout_of, weights
from moe_jax.fields import override
from tests.export.conftest import ARCHS, config_of


@pytest.mark.parametrize("layout, changes, field, why", [
    ("qwen3_moe", {"arch.n_shared_experts": 1}, "arch.n_shared_experts", "no shared experts"),
    ("qwen3_moe", {"moe.router": "sigmoid"}, "moe.router", "a softmax over all experts"),
    ("qwen3_moe", {"arch.qk_norm": "none"}, "arch.qk_norm", "normalizes each head"),
    ("olmoe", {"arch.qk_norm": "head"}, "arch.qk_norm", "normalizes the whole query and"),
    ("mixtral", {"arch.qk_norm": "head"}, "arch.qk_norm", "normalizes neither"),
    ("olmoe", {"arch.n_dense_layers": 1}, "arch.n_dense_layers", "all its layers are mixtures"),
    ("mixtral", {"arch.n_dense_layers": 2}, "arch.n_dense_layers", "all its layers are mixtures"),
    ("mixtral", {"moe.norm_topk_prob": False}, "moe.norm_topk_prob", "always divides"),
    ("olmoe", {"arch.head_dim": 6}, "arch.head_dim", "d_model / n_heads wide, which is 16 / 4"),
])
def test_what_a_layout_cannot_express_is_refused(layout, changes, field, why):
  with pytest.raises(FieldError, match=f"{layout} cannot express this: .*{why}") as caught:
    layout_of(override(config_of(layout), changes), layout)
  assert caught.value.field == f"config.{field}"


@pytest.mark.parametrize("layout", ARCHS)
def test_the_layout_follows_from_what_is_normalized(layout):
  assert layout_of(config_of(layout)).name == layout


def test_an_unknown_layout_is_refused():
  with pytest.raises(FieldError, match="layout='gpt2': must be qwen3_moe or olmoe or mixtral"):
    layout_of(config_of("olmoe"), "gpt2")


@pytest.mark.parametrize("layout", ARCHS)
def test_config_json_says_the_architecture(layout):
  config = config_of(layout)
  read = from_config_json(config_json(config, LAYOUTS[layout], "bfloat16", 256))
  assert (read.arch, read.layout.name) == (config.arch, layout)
  assert read.moe.norm_topk_prob == config.moe.norm_topk_prob
  assert read.model == ModelConfig("bfloat16", config.model.rope_theta, config.model.norm_eps)
  assert read.max_positions == 16


@pytest.mark.parametrize("layout, eager", [("qwen3_moe", False), ("mixtral", True)])
def test_widths_that_torchs_grouped_product_refuses_ask_for_the_loop(layout, eager):
  """Experts of 16 and of 10: transformers_test.py runs both."""
  said = config_json(config_of(layout), LAYOUTS[layout], "float32", 256)
  assert said.get("experts_implementation") == ("eager" if eager else None)


@pytest.mark.parametrize("key, value", [
    ("model_type", ["qwen3_moe"]), ("num_hidden_layers", "2"), ("num_hidden_layers", 10**9),
    ("hidden_size", 16.0), ("num_experts", True), ("rms_norm_eps", "1e-6"), ("rope_theta", 0),
    ("rope_parameters", "default"), ("rope_parameters", {"rope_theta": "1e4"}),
    ("mlp_only_layers", 0), ("decoder_sparse_step", 0), ("tie_word_embeddings", "no")])
def test_a_key_of_another_kind_is_refused_by_its_name(key, value):
  said = config_json(config_of("qwen3_moe"), LAYOUTS["qwen3_moe"], "float32", 256)
  with pytest.raises(FieldError, match=f"config.json: {key}=.*must be ") as caught:
    from_config_json(said | {key: value})
  assert "\n" not in str(caught.value)


_OLD = {"num_local_experts", "rope_parameters", "dtype"}  # what transformers 5 alone says
_NEW = {"num_experts", "rope_theta", "torch_dtype"}  # what 4.57 alone says


@pytest.mark.parametrize("left_out", [_OLD, _NEW], ids=["4.57", "5"])
def test_either_generation_of_keys_is_enough(left_out):
  config = config_of("qwen3_moe")
  said = config_json(config, LAYOUTS["qwen3_moe"], "bfloat16", 256)
  read = from_config_json({key: value for key, value in said.items() if key not in left_out})
  assert read.arch == config.arch and read.model.compute_dtype == "bfloat16"
  assert read.model.rope_theta == 50_000.0


def test_what_is_left_out_is_the_classs_default():
  said = {"model_type": "mixtral", "hidden_size": 64, "num_hidden_layers": 1,
          "num_attention_heads": 8, "intermediate_size": 12, "num_local_experts": 4,
          "num_experts_per_tok": 2, "vocab_size": 300}
  read = from_config_json(said)
  assert (read.arch.kv_heads, read.arch.d_head) == (8, 8) and not read.arch.tie_embeddings
  assert (read.model.rope_theta, read.model.norm_eps) == (1e6, 1e-5)
  assert read.moe.norm_topk_prob
  assert not from_config_json(said | {"model_type": "olmoe"}).moe.norm_topk_prob


@pytest.mark.parametrize("layout, changes, message", [
    ("olmoe", {"model_type": "llama"}, "model_type='llama'.*must be qwen3_moe or olmoe or mixtral"),
    ("olmoe", {"clip_qkv": 8.0}, "clip_qkv=8.0.*must be null"),
    ("olmoe", {"attention_bias": True}, "attention_bias=True.*must be false"),
    ("olmoe", {"hidden_act": "gelu"}, "hidden_act='gelu'.*must be 'silu'"),
    ("olmoe", {"hidden_size": None}, "hidden_size=None.*is missing"),
    ("olmoe", {"num_experts_per_tok": 99}, "architecture: n_topk=99: must be at most n_exp"),
    ("olmoe", {"rope_scaling": {"type": "yarn"}}, "rope_scaling=.*must be of type 'default'"),
    ("mixtral", {"sliding_window": 8}, "sliding_window=8.*must be null"),
    ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 8}, "sliding_window=8"),
    ("qwen3_moe", {"mlp_only_layers": [1]}, r"mlp_only_layers=\[1\].*only the first layers"),
    ("qwen3_moe", {"decoder_sparse_step": 2}, r"decoder_sparse_step=2 makes the layers \[0, 2\]"),
])
def test_what_this_project_has_not_is_refused(layout, changes, message):
  said = config_json(config_of(layout), LAYOUTS[layout], "float32", 256) | changes
  with pytest.raises(FieldError, match=message) as caught:
    from_config_json(said)
  assert caught.value.field == "hf" and "\n" not in str(caught.value)


def test_a_window_as_long_as_the_model_is_none():
  said = config_json(config_of("mixtral"), LAYOUTS["mixtral"], "float32", 256)
  assert from_config_json(said | {"sliding_window": 16}).arch == ARCHS["mixtral"]


def test_each_tensor_has_one_place_and_every_parameter_a_tensor():
  for layout, arch in ARCHS.items():
    found = list(weights(arch, LAYOUTS[layout]))
    assert len({weight.name for weight in found}) == len(found)
    assert len({(weight.path, weight.index) for weight in found}) == len(found)


def test_only_mappings_are_configurations():
  with pytest.raises(FieldError, match="is damaged: not an object"):
    layouts.from_config_json([])
