"""Counts the parameters, FLOPs and bytes of an architecture exactly, and by the paper's formulas.

Parameter counts equal those of the real tree, including every norm scale and router:

    embed [V,D]; head [D,V] unless tied; final norm [D]
    every layer   two norms [D]; q [D,H,h]; k, v [D,Kv,h]; o [H,h,D]; q and k norm [h]
                  (of the projections [H,h] and [Kv,h], or none: qk_norm)
    an MoE layer  router [D,E]; gate, up [E,D,F]; down [E,F,D]; one shared SwiGLU of
                  hidden width n_shared_experts * F
    a dense layer one SwiGLU of hidden width dense_width, no router

FLOPs count a multiply-add as two, for every matrix product of the model: projections,
router, experts, attention scores and values, output head. Not counted: the embedding
lookup, norms, softmaxes, activations, the optimizer, padding of expert capacity, and
recomputation by remat; nothing is subtracted for dropped tokens.

Causal convention: the query at position t attends to t + 1 keys, (seq_len + 1) / 2 on
average, so only the lower triangle counts. Document masks are ignored.

Everything here is arithmetic on the fields of an Architecture, so the parameter counts also
work for an object with the same field names that holds NumPy arrays (as in the iso solver).
"""

from moe_jax.arch.architecture import Architecture
from moe_jax.errors import did_you_mean, require

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8": 1, "int8": 1}


def n_parameters(arch: Architecture, n_routed: int) -> int:
  """All parameters but embedding and head, with `n_routed` experts in each MoE layer.

  `n_routed` = n_exp gives N_total, n_topk gives N_active, and 0 gives all but the routed
  experts (routers are always included).
  """
  d_model = arch.d_model
  projections = 2 * d_model * (arch.n_heads + arch.kv_heads) * arch.d_head
  every_layer = projections + arch.qk_norm_scales + 2 * d_model
  swiglu = 3 * d_model  # per unit of hidden width
  moe = d_model * arch.n_exp + (n_routed + arch.n_shared_experts) * swiglu * arch.d_expert
  dense = swiglu * arch.dense_width
  return (d_model + arch.n_layers * every_layer + arch.n_moe_layers * moe
          + arch.n_dense_layers * dense)


def n_total(arch: Architecture) -> int:
  """N_total: parameters without the embedding and the output head."""
  return n_parameters(arch, arch.n_exp)


def n_active(arch: Architecture) -> int:
  """N_active: the part of N_total that one token uses, with n_topk of the routed experts."""
  return n_parameters(arch, arch.n_topk)


def n_embedding(arch: Architecture) -> int:
  """Parameters of the embedding and the output head, which are one table if tied."""
  return (1 if arch.tie_embeddings else 2) * arch.vocab_size * arch.d_model


def n_total_with_embedding(arch: Architecture) -> int:
  """Every parameter of the model: the size of its tree."""
  return n_total(arch) + n_embedding(arch)


def n_active_with_embedding(arch: Architecture) -> int:
  """N_active, the embedding and the output head."""
  return n_active(arch) + n_embedding(arch)


def paper_n_total(arch: Architecture) -> int:
  """l d² (4 + 3 n_exp / g): arXiv 2601.08215's approximation of N_total.

  It omits routers, norms and embeddings, counts attention as 4 d² (no grouped-query
  attention, heads that fill d_model), and has neither shared experts nor dense layers.
  """
  return _paper_count(arch, arch.n_exp)


def paper_n_active(arch: Architecture) -> int:
  """l d² (4 + 3 n_topk / g): arXiv 2601.08215's approximation of N_active."""
  return _paper_count(arch, arch.n_topk)


def _paper_count(arch: Architecture, n_routed: int) -> int:
  # d² / g is d * d_expert, which is exact in integers.
  return arch.n_layers * arch.d_model * (4 * arch.d_model + 3 * n_routed * arch.d_expert)


def _layer_matmul_parameters(arch: Architecture) -> int:
  """Parameters in the matrix products of one token, without the head."""
  norm_scales = arch.d_model + arch.n_layers * (2 * arch.d_model + arch.qk_norm_scales)
  return n_active(arch) - norm_scales


def forward_flops_per_token(arch: Architecture, seq_len: int) -> int:
  """FLOPs of one forward pass over sequences of `seq_len`, per token.

  For the conventions (multiply-adds, causal attention, what is not counted) see the module's
  docstring. Scores and values take 2 * 2 * H * h FLOPs per key and layer.

  Raises:
    FieldError: `seq_len` is below 1.
  """
  require(seq_len >= 1, "seq_len", seq_len, "must be at least 1")
  attention = 2 * arch.n_layers * arch.n_heads * arch.d_head * (seq_len + 1)
  head = arch.d_model * arch.vocab_size
  return 2 * (_layer_matmul_parameters(arch) + head) + attention


def training_flops_per_token(arch: Architecture, seq_len: int) -> int:
  """Three times the forward pass, since the backward pass counts twice; used for MFU."""
  return 3 * forward_flops_per_token(arch, seq_len)


def prefill_flops_per_token(arch: Architecture, seq_len: int) -> float:
  """FLOPs per token of prefilling the cache with a prompt of `seq_len` tokens.

  Those of the forward pass, but with the output head for the last position only.
  """
  head = 2 * arch.d_model * arch.vocab_size
  return forward_flops_per_token(arch, seq_len) - head + head / seq_len


def decode_flops_per_token(arch: Architecture, context: int) -> int:
  """FLOPs of decoding one token that attends to `context` keys, including its own.

  Raises:
    FieldError: `context` is below 1.
  """
  require(context >= 1, "context", context, "must be at least 1")
  attention = 4 * arch.n_layers * arch.n_heads * arch.d_head * context
  head = arch.d_model * arch.vocab_size
  return 2 * (_layer_matmul_parameters(arch) + head) + attention


def dtype_bytes(dtype: str) -> int:
  """Bytes per element. Raises FieldError for a name that is not in DTYPE_BYTES."""
  require(dtype in DTYPE_BYTES, "dtype", dtype, did_you_mean(str(dtype), list(DTYPE_BYTES)))
  return DTYPE_BYTES[dtype]


def weight_bytes(arch: Architecture, dtype: str) -> int:
  """Bytes of all weights, embeddings included, each stored as `dtype`."""
  return n_total_with_embedding(arch) * dtype_bytes(dtype)


def optimizer_bytes(arch: Architecture) -> int:
  """Bytes of AdamW's two float32 moments: 8 per parameter. Excludes master weights."""
  return 2 * weight_bytes(arch, "float32")


def kv_cache_bytes(arch: Architecture, batch: int, context: int, dtype: str) -> int:
  """Bytes of the keys and values of `batch` sequences of `context` tokens, all layers.

  Raises:
    FieldError: `batch` or `context` is below 1, or `dtype` is not in DTYPE_BYTES.
  """
  require(batch >= 1, "batch", batch, "must be at least 1")
  require(context >= 1, "context", context, "must be at least 1")
  per_token = 2 * arch.n_layers * arch.kv_heads * arch.d_head
  return per_token * batch * context * dtype_bytes(dtype)
