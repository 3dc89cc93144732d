"""Child of benchmarks.train_step: serves Hugging Face's Qwen3MoeForCausalLM in PyTorch."""

import json
import os
import sys
import time

import numpy as np
import torch
import transformers
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from benchmarks.step_limits import Product, products
from benchmarks.step_serve import serve
from moe_jax.config import RunConfig, config_from_dict


class Peer:
  """The peer's step: forward, backward, clipping and AdamW, from the weights of `step_ours`."""

  name = f"transformers {transformers.__version__}, torch {torch.__version__}"

  def __init__(self, config: RunConfig, tokens: str, weights: str, backend: str):
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    arch, train, self._config = config.arch, config.train, config
    self._dtype = getattr(torch, config.model.compute_dtype)
    tokens_BS = torch.from_numpy(np.load(tokens)).long()
    self._inputs, self._targets = tokens_BS[:, :-1], tokens_BS[:, 1:].contiguous()
    self._model = Qwen3MoeForCausalLM(Qwen3MoeConfig(
        vocab_size=arch.vocab_size, hidden_size=arch.d_model, intermediate_size=arch.d_model,
        num_hidden_layers=arch.n_layers, num_attention_heads=arch.n_heads,
        num_key_value_heads=arch.kv_heads, head_dim=arch.d_head, num_experts=arch.n_exp,
        num_experts_per_tok=arch.n_topk, moe_intermediate_size=arch.d_expert,
        norm_topk_prob=config.moe.norm_topk_prob, rms_norm_eps=config.model.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.model.rope_theta},
        max_position_embeddings=config.data.seq_len, tie_word_embeddings=False, use_cache=False))
    with np.load(weights) as ours:
      self._model.load_state_dict({name: torch.from_numpy(np.ascontiguousarray(array))
                                   for name, array in renamed(ours, arch.n_layers).items()})
    self._model.to(self._dtype).set_experts_implementation(backend)
    self._optimizer = torch.optim.AdamW(
        self._model.parameters(), lr=train.learning_rate, betas=(train.beta1, train.beta2),
        eps=train.eps, weight_decay=train.weight_decay, fused=True)
    self._clip = train.clip_norm
    self._x = torch.randn(tokens_BS[:, 1:].numel(), arch.d_model, dtype=self._dtype,
                          requires_grad=True)

  def step(self) -> float:
    """Takes a step; returns the loss before it."""
    loss = self._model(input_ids=self._inputs, labels=self._inputs,
                       shift_labels=self._targets).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._clip)
    self._optimizer.step()
    self._optimizer.zero_grad()
    return loss.item()

  def head(self) -> float:
    """Runs output head and loss, forward and backward; returns the loss."""
    logits = self._model.lm_head(self._x).float()
    loss = torch.nn.functional.cross_entropy(logits, self._targets.view(-1))
    loss.backward()
    self._model.zero_grad()
    self._x.grad = None
    return loss.item()

  def matmuls(self) -> list[float]:
    """Times each product of the step, in seconds."""
    return [_seconds_of(product, self._dtype) for product in products(
        self._config.arch, self._config.train.batch_size, self._config.data.seq_len)]


def renamed(ours, n_layers: int) -> dict[str, np.ndarray]:
  """Renames our arrays to Qwen3-MoE's names and converts them to its layout, output first."""
  named = {"model.embed_tokens.weight": ours["embedding_VD"],
           "model.norm.weight": ours["final_norm_D"], "lm_head.weight": ours["w_head_DV"].T}
  for layer in range(n_layers):
    def get(name, layer=layer):
      return ours["moe_layers/" + name][layer]

    def projection(name, get=get):
      w_DHh = get(f"attention/{name}")
      return w_DHh.reshape(w_DHh.shape[0], -1).T

    gate_up_EDH = np.concatenate([get("moe/w_gate_EDF"), get("moe/w_up_EDF")], axis=-1)
    w_out_HhD = get("attention/w_out_HhD")
    named |= {f"model.layers.{layer}.{name}": array for name, array in {
        "input_layernorm.weight": get("attention_norm_D"),
        "post_attention_layernorm.weight": get("ff_norm_D"),
        "self_attn.q_proj.weight": projection("w_query_DHh"),
        "self_attn.k_proj.weight": projection("w_key_DKh"),
        "self_attn.v_proj.weight": projection("w_value_DKh"),
        "self_attn.o_proj.weight": w_out_HhD.reshape(-1, w_out_HhD.shape[-1]).T,
        "self_attn.q_norm.weight": get("attention/query_norm_h"),
        "self_attn.k_norm.weight": get("attention/key_norm_h"),
        "mlp.gate.weight": get("moe/w_router_DE").T,
        "mlp.experts.gate_up_proj": gate_up_EDH.swapaxes(1, 2),
        "mlp.experts.down_proj": get("moe/w_down_EFD").swapaxes(1, 2)}.items()}
  return named


def _seconds_of(product: Product, dtype) -> float:
  _, _, b, m, k, n, transposed = product
  left = torch.ones((b, k, m) if transposed == "left" else (b, m, k), dtype=dtype)
  right = torch.ones((b, n, k) if transposed == "right" else (b, k, n), dtype=dtype)
  left = left.mT if transposed == "left" else left
  right = right.mT if transposed == "right" else right
  seconds = []
  for _ in range(5):
    start = time.perf_counter()
    left @ right
    seconds.append(time.perf_counter() - start)
  return min(seconds[1:])


if __name__ == "__main__":
  config, tokens, weights, backend = sys.argv[1:]
  serve(Peer(config_from_dict(json.loads(config)), tokens, weights, backend))
