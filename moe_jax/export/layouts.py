"""Maps this project's configurations and parameters to and from Hugging Face layouts. No JAX.

A layout is a model class of transformers: the names of its weights, the keys of its config.json,
and the architectures it can express. A projection matrix is [out, in] there and [in, out] here; the
rotary embedding rotates the same pairs (rotate-half).

config.json holds some values under two keys, for two major versions of transformers. As observed,
version 5 writes `num_local_experts`, `rope_parameters` and `dtype`, while 4.57 reads `num_experts`,
`rope_theta` and `torch_dtype` and silently falls back to defaults without them.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from moe_jax.config import Architecture, ModelConfig, MoEConfig, RunConfig
from moe_jax.errors import FieldError, require


@dataclasses.dataclass(frozen=True)
class Layout:
  """A model class of transformers.

  Attributes:
    name: its `model_type`.
    model_class: name of the class, listed in `architectures`.
    qk_norm: how it normalizes queries and keys (Architecture.qk_norm).
    feed_forward: name of a layer's module that holds the router and experts.
    expert: names of an expert's gate, up and down matrices.
    expert_width: config.json key for the width of an expert.
    defaults: defaults of the class for keys missing from config.json.
    may_be_dense: whether the first layers may be dense.
    norm_topk_prob: whether the top-k probabilities are divided by their sum; None if
      config.json decides.
    has_head_dim: whether the head dimension may differ from d_model / n_heads.
  """

  name: str
  model_class: str
  qk_norm: str
  feed_forward: str
  expert: tuple[str, str, str]
  expert_width: str
  defaults: Mapping[str, Any]
  may_be_dense: bool
  norm_topk_prob: bool | None
  has_head_dim: bool


_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_COMMON = {"hidden_act": "silu", "attention_bias": False, "tie_word_embeddings": False,
           "norm_topk_prob": False, "decoder_sparse_step": 1, "mlp_only_layers": (),
           "head_dim": None, "clip_qkv": None, "sliding_window": None}
LAYOUTS = {layout.name: layout for layout in (
    Layout("qwen3_moe", "Qwen3MoeForCausalLM", "head", "mlp", _PROJECTIONS,
           "moe_intermediate_size",
           {**_COMMON, "num_key_value_heads": 4, "rms_norm_eps": 1e-6, "rope_theta": 1e4},
           may_be_dense=True, norm_topk_prob=None, has_head_dim=True),
    Layout("olmoe", "OlmoeForCausalLM", "projection", "mlp", _PROJECTIONS,
           "intermediate_size",
           {**_COMMON, "num_key_value_heads": None, "rms_norm_eps": 1e-5, "rope_theta": 1e4},
           may_be_dense=False, norm_topk_prob=None, has_head_dim=False),
    Layout("mixtral", "MixtralForCausalLM", "none", "block_sparse_moe", ("w1", "w3", "w2"),
           "intermediate_size",
           {**_COMMON, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e6},
           may_be_dense=False, norm_topk_prob=True, has_head_dim=True))}


# Transformers 5 runs the experts with torch's grouped matmul, which rejects rows that are not a
# multiple of 16 bytes (8 bfloat16 values). For other widths config.json selects the expert loop.
_GROUPED = 8


@dataclasses.dataclass(frozen=True)
class Weight:
  """One tensor of a layout and its place in this project's parameters.

  Attributes:
    name: name in the layout.
    shape: shape in the layout.
    path: path of the array in the parameters.
    index: index of the tensor in that array: (), (layer,) or (layer, expert).
    transposed: whether the tensor is [out, in] there and [in, out] here.
  """

  name: str
  shape: tuple[int, ...]
  path: tuple[str, ...]
  index: tuple[int, ...] = ()
  transposed: bool = False

  @property
  def size(self) -> int:
    return math.prod(self.shape)

  def from_layout(self, theirs: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Views the layout's tensor as its part of this project's array, in `shape`; no copy."""
    return (theirs.T if self.transposed else theirs).reshape(shape)


def weights(arch: Architecture, layout: Layout) -> Iterator[Weight]:
  """Yields every tensor of the model in the layout, layer by layer."""
  d, vocab = arch.d_model, arch.vocab_size
  yield Weight("model.embed_tokens.weight", (vocab, d), ("embedding_VD",))
  for layer in range(arch.n_layers):
    dense = layer < arch.n_dense_layers
    stack = "dense_layers" if dense else "moe_layers"
    index = (layer if dense else layer - arch.n_dense_layers,)
    yield from _attention(arch, f"model.layers.{layer}", stack, index)
    prefix = f"model.layers.{layer}.{layout.feed_forward}"
    if dense:
      for name, part, shape in zip(_PROJECTIONS, ("w_gate_DF", "w_up_DF", "w_down_FD"),
                                   _swiglu(d, arch.dense_width), strict=True):
        yield Weight(f"{prefix}.{name}.weight", shape, (stack, "ff", part), index, True)
      continue
    yield Weight(f"{prefix}.gate.weight", (arch.n_exp, d), (stack, "moe", "w_router_DE"), index,
                 True)
    for expert in range(arch.n_exp):
      for name, part, shape in zip(layout.expert, ("w_gate_EDF", "w_up_EDF", "w_down_EFD"),
                                   _swiglu(d, arch.d_expert), strict=True):
        yield Weight(f"{prefix}.experts.{expert}.{name}.weight", shape, (stack, "moe", part),
                     (*index, expert), True)
  yield Weight("model.norm.weight", (d,), ("final_norm_D",))
  if not arch.tie_embeddings:
    yield Weight("lm_head.weight", (vocab, d), ("w_head_DV",), (), True)


def _swiglu(d_model: int, hidden: int) -> tuple[tuple[int, int], ...]:
  return (hidden, d_model), (hidden, d_model), (d_model, hidden)


def _attention(arch: Architecture, prefix: str, stack: str, index: tuple[int]
               ) -> Iterator[Weight]:
  d, h = arch.d_model, arch.d_head
  queries, keys = arch.n_heads * h, arch.kv_heads * h
  yield Weight(f"{prefix}.input_layernorm.weight", (d,), (stack, "attention_norm_D"), index)
  for name, part, shape in (("q", "w_query_DHh", (queries, d)), ("k", "w_key_DKh", (keys, d)),
                            ("v", "w_value_DKh", (keys, d)), ("o", "w_out_HhD", (d, queries))):
    yield Weight(f"{prefix}.self_attn.{name}_proj.weight", shape, (stack, "attention", part),
                 index, True)
  normed = {"head": (("query_norm_h", h), ("key_norm_h", h)), "none": (),
            "projection": (("query_norm_Hh", queries), ("key_norm_Kh", keys))}[arch.qk_norm]
  for name, (part, size) in zip("qk", normed, strict=False):
    yield Weight(f"{prefix}.self_attn.{name}_norm.weight", (size,), (stack, "attention", part),
                 index)
  yield Weight(f"{prefix}.post_attention_layernorm.weight", (d,), (stack, "ff_norm_D"), index)


# To Hugging Face


def layout_of(config: RunConfig, name: str | None = None) -> Layout:
  """Returns the layout for a configuration, after checking that it can express it.

  Args:
    config: configuration of the run.
    name: name of the layout; None selects the one with the run's qk_norm.

  Raises:
    FieldError: no such layout, or it cannot express a field; names that field.
  """
  arch, moe = config.arch, config.moe
  if name is None:
    (layout,) = [found for found in LAYOUTS.values() if found.qk_norm == arch.qk_norm]
  else:
    require(name in LAYOUTS, "layout", name, f"must be {' or '.join(LAYOUTS)}")
    layout = LAYOUTS[name]

  def check(holds: bool, field: str, value: Any, accepted: str) -> None:
    require(holds, f"config.{field}", value, f"{layout.name} cannot express this: {accepted}")

  check(moe.router == "softmax", "moe.router", moe.router,
        "its router is a softmax over all experts")
  check(arch.n_shared_experts == 0, "arch.n_shared_experts", arch.n_shared_experts,
        "it has no shared experts")
  check(arch.qk_norm == layout.qk_norm, "arch.qk_norm", arch.qk_norm,
        {"head": "it normalizes each head of queries and keys",
         "projection": "it normalizes the whole query and key projections",
         "none": "it normalizes neither queries nor keys"}[layout.qk_norm])
  check(layout.may_be_dense or arch.n_dense_layers == 0, "arch.n_dense_layers",
        arch.n_dense_layers, "all its layers are mixtures of experts")
  check(layout.norm_topk_prob in (None, moe.norm_topk_prob), "moe.norm_topk_prob",
        moe.norm_topk_prob, "it always divides the chosen probabilities by their sum")
  check(layout.has_head_dim or arch.d_head * arch.n_heads == arch.d_model, "arch.head_dim",
        arch.d_head, f"its heads are d_model / n_heads wide, which is {arch.d_model} / "
        f"{arch.n_heads}")
  return layout


def config_json(config: RunConfig, layout: Layout, dtype: str, document_start_id: int
                ) -> dict[str, Any]:
  """Returns the content of config.json for transformers 4.57 and 5."""
  arch, theta = config.arch, config.model.rope_theta
  said = {
      "architectures": [layout.model_class], "model_type": layout.name,
      "vocab_size": arch.vocab_size, "hidden_size": arch.d_model,
      "num_hidden_layers": arch.n_layers, "num_attention_heads": arch.n_heads,
      "num_key_value_heads": arch.kv_heads, "hidden_act": "silu", "attention_bias": False,
      "attention_dropout": 0.0, "max_position_embeddings": config.data.seq_len,
      "rms_norm_eps": config.model.norm_eps, "tie_word_embeddings": arch.tie_embeddings,
      "rope_theta": theta, "rope_parameters": {"rope_type": "default", "rope_theta": theta},
      "num_experts": arch.n_exp, "num_local_experts": arch.n_exp,
      "num_experts_per_tok": arch.n_topk, "norm_topk_prob": config.moe.norm_topk_prob,
      "output_router_logits": False, "router_aux_loss_coef": config.moe.balance_weight,
      "intermediate_size": arch.dense_width if layout.may_be_dense else arch.d_expert,
      layout.expert_width: arch.d_expert, "sliding_window": None,
      "bos_token_id": document_start_id, "eos_token_id": document_start_id,
      "pad_token_id": None, "dtype": dtype, "torch_dtype": dtype}
  if layout.has_head_dim:
    said["head_dim"] = arch.d_head
  if arch.d_model % _GROUPED or arch.d_expert % _GROUPED:
    said["experts_implementation"] = "eager"
  if layout.may_be_dense:
    said |= {"decoder_sparse_step": 1, "mlp_only_layers": list(range(arch.n_dense_layers)),
             "use_sliding_window": False}
  return said


# From Hugging Face


def _is_count(value: Any) -> bool:
  return type(value) is int and 0 < value < 2**16


def _is_size(value: Any) -> bool:
  return type(value) is int and 0 < value < 2**31


def _is_positive(value: Any) -> bool:
  return type(value) in (int, float) and 0 < value < math.inf


def _is_bool(value: Any) -> bool:
  return type(value) is bool


def _is_rope(value: Any) -> bool:
  return isinstance(value, dict) and _is_positive(value.get("rope_theta", 1))


def _are_layers(value: Any) -> bool:
  return isinstance(value, list) and all(type(layer) is int for layer in value)


# key -> (check, accepted): validates the keys of config.json that are present and not null.
_KINDS = {key: (is_one, what) for is_one, what, keys in (
    (_is_count, "a whole number from 1 to 65535", (
        "num_hidden_layers", "num_experts", "num_local_experts", "num_experts_per_tok",
        "decoder_sparse_step")),
    (_is_size, "a whole number above 0", (
        "vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim",
        "intermediate_size", "moe_intermediate_size", "max_position_embeddings",
        "sliding_window")),
    (_is_positive, "a number above 0", ("rms_norm_eps", "rope_theta")),
    (_is_bool, "true or false", ("norm_topk_prob", "tie_word_embeddings", "use_sliding_window")),
    (_is_rope, "an object whose rope_theta is a number", ("rope_scaling", "rope_parameters")),
    (_are_layers, "a list of layer indices", ("mlp_only_layers",))) for key in keys}


@dataclasses.dataclass(frozen=True)
class Imported:
  """A config.json translated to this project's configuration."""

  layout: Layout
  arch: Architecture
  moe: MoEConfig
  model: ModelConfig
  max_positions: int | None


def from_config_json(said: Any) -> Imported:
  """Reads a config.json of transformers 4.57 or 5.

  Raises:
    FieldError: names `hf`; a key is missing or invalid, or this project does not support its
      value.
  """
  require(isinstance(said, dict), "hf", "config.json", "is damaged: not an object")

  def refuse(key: str, why: str):
    raise FieldError("hf", f"config.json: {key}={said.get(key)!r}", why)

  layout = LAYOUTS.get(str(said.get("model_type")))
  if layout is None:
    refuse("model_type", f"must be {' or '.join(LAYOUTS)}")
  for key, (is_one, what) in _KINDS.items():
    if said.get(key) is not None and not is_one(said[key]):
      refuse(key, f"must be {what}")

  def get(*keys: str) -> Any:
    for key in keys:
      if said.get(key) is not None:
        return said[key]
    if keys[-1] not in layout.defaults:
      refuse(keys[0], "is missing")
    return layout.defaults[keys[-1]]

  for key, wanted, why in (
      ("hidden_act", "silu", "must be 'silu': the experts are SwiGLU"),
      ("attention_bias", False, "must be false: projections have no bias"),
      ("clip_qkv", None, "must be null: nothing is clipped")):
    if get(key) != wanted:
      refuse(key, why)
  _refuse_window(said, layout, refuse)
  n_layers, n_heads = get("num_hidden_layers"), get("num_attention_heads")
  kv_heads, head_dim = get("num_key_value_heads"), get("head_dim")
  n_dense = _dense_layers(get, n_layers, refuse) if layout.may_be_dense else 0
  try:
    arch = Architecture(
        n_layers=n_layers, d_model=get("hidden_size"), d_expert=get(layout.expert_width),
        n_exp=get("num_experts", "num_local_experts"), n_topk=get("num_experts_per_tok"),
        n_heads=n_heads, n_kv_heads=None if kv_heads == n_heads else kv_heads,
        head_dim=None if head_dim in (None, get("hidden_size") / n_heads) else head_dim,
        vocab_size=get("vocab_size"), n_dense_layers=n_dense,
        d_dense=get("intermediate_size") if n_dense else None,
        tie_embeddings=get("tie_word_embeddings"), qk_norm=layout.qk_norm)
    moe = MoEConfig(dispatch="dropless", norm_topk_prob=(
        get("norm_topk_prob") if layout.norm_topk_prob is None else layout.norm_topk_prob))
    model = ModelConfig(
        compute_dtype="bfloat16" if "bfloat16" in (said.get("dtype"), said.get("torch_dtype"))
        else "float32", rope_theta=float(_rope_theta(said, layout, refuse)),
        norm_eps=float(get("rms_norm_eps")))
  except FieldError as error:
    raise FieldError("hf", "config.json", f"is not a supported architecture: {error}") from None
  return Imported(layout, arch, moe, model, said.get("max_position_embeddings"))


def _refuse_window(said: Mapping[str, Any], layout: Layout, refuse) -> None:
  """Refuses a sliding window shorter than the context: attention here has none."""
  window = said.get("sliding_window")
  used = said.get("use_sliding_window", False) if layout.may_be_dense else window is not None
  if used and window is not None and window < (
      said.get("max_position_embeddings") or math.inf):
    refuse("sliding_window", "must be null: attention here sees the whole document")


def _rope_theta(said: Mapping[str, Any], layout: Layout, refuse) -> float:
  theta = said.get("rope_theta")
  for key in ("rope_scaling", "rope_parameters"):
    rope = said.get(key) or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
      refuse(key, "must be of type 'default': the rotary embedding here is not scaled")
    theta = rope.get("rope_theta", theta)
  return layout.defaults["rope_theta"] if theta is None else theta


def _dense_layers(get, n_layers: int, refuse) -> int:
  """Counts the leading dense layers, by decoder_sparse_step and mlp_only_layers of Qwen3-MoE."""
  every, listed = get("decoder_sparse_step"), set(get("mlp_only_layers"))
  dense = [layer for layer in range(n_layers)
           if layer in listed or (layer + 1) % every]
  if dense != list(range(len(dense))):
    refuse("mlp_only_layers", f"with decoder_sparse_step={every!r} makes the layers {dense} "
           "dense: only the first layers can be dense here")
  return len(dense)
