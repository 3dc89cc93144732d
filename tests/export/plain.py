"""Qwen3-MoE, OLMoE and Mixtral in NumPy, from a Hugging Face directory: short, slow, obvious.

It knows nothing of this project: names, shapes and math are those of the three model classes.
"""

import json
import pathlib

import numpy as np
from safetensors.numpy import load_file


class Model:
  """What config.json and the files of weights say."""

  def __init__(self, directory: pathlib.Path):
    self.said = json.loads((directory / "config.json").read_text())
    self.kind = self.said["model_type"]
    index = directory / "model.safetensors.index.json"
    names = (set(json.loads(index.read_text())["weight_map"].values()) if index.exists()
             else {"model.safetensors"})
    self.weights = {}
    for name in names:
      self.weights |= load_file(directory / name)
    self.used = set()

  def __call__(self, tokens_S):
    """(logits [S, vocabulary], experts of each layer and token, sorted, gate probabilities)."""
    said = self.said
    x_SD = self._get("model.embed_tokens")[tokens_S]
    experts, probabilities = [], []
    for layer in range(said["num_hidden_layers"]):
      name = f"model.layers.{layer}"
      x_SD = x_SD + self._attention(f"{name}.self_attn", self._norm(
          x_SD, f"{name}.input_layernorm"))
      normed_SD = self._norm(x_SD, f"{name}.post_attention_layernorm")
      if layer in said.get("mlp_only_layers", ()):
        y_SD = self._swiglu(normed_SD, f"{name}.mlp", ("gate_proj", "up_proj", "down_proj"))
      else:
        y_SD, chosen, probability = self._mixture(normed_SD, name)
        experts.append(chosen)
        probabilities.append(probability)
      x_SD = x_SD + y_SD
    head = "model.embed_tokens" if said["tie_word_embeddings"] else "lm_head"
    logits = self._norm(x_SD, "model.norm") @ self._get(head).T
    return logits, np.stack(experts), np.stack(probabilities)

  def _get(self, name):
    self.used.add(f"{name}.weight")
    return self.weights[f"{name}.weight"].astype(np.float64)

  def _norm(self, x, name):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + self.said["rms_norm_eps"]) * self._get(name)

  def _swiglu(self, x_SD, name, parts):
    gate, up, down = (self._get(f"{name}.{part}") for part in parts)
    hidden = x_SD @ gate.T
    return (hidden / (1 + np.exp(-hidden)) * (x_SD @ up.T)) @ down.T

  def _mixture(self, x_SD, name):
    said = self.said
    name, parts = {"mixtral": (f"{name}.block_sparse_moe", ("w1", "w3", "w2"))}.get(
        self.kind, (f"{name}.mlp", ("gate_proj", "up_proj", "down_proj")))
    logit_SE = x_SD @ self._get(f"{name}.gate").T
    prob_SE = np.exp(logit_SE - logit_SE.max(-1, keepdims=True))
    prob_SE /= prob_SE.sum(-1, keepdims=True)
    chosen_SK = np.argsort(-prob_SE, axis=-1)[:, :said["num_experts_per_tok"]]
    y_SD = np.zeros_like(x_SD)
    for token, chosen in enumerate(chosen_SK):
      weight = prob_SE[token, chosen]
      if self.kind == "mixtral" or said["norm_topk_prob"]:
        weight = weight / weight.sum()
      for expert, w in zip(chosen, weight, strict=True):
        y_SD[token] += w * self._swiglu(x_SD[token], f"{name}.experts.{expert}", parts)
    return y_SD, np.sort(chosen_SK, -1), prob_SE

  def _attention(self, name, x_SD):
    said, size = self.said, len(x_SD)
    heads, kv_heads = said["num_attention_heads"], said["num_key_value_heads"]
    q, k, v = (x_SD @ self._get(f"{name}.{part}_proj").T for part in "qkv")
    if self.kind == "olmoe":  # the whole projection
      q, k = self._norm(q, f"{name}.q_norm"), self._norm(k, f"{name}.k_norm")
    q, k, v = (y.reshape(size, n, -1) for y, n in ((q, heads), (k, kv_heads), (v, kv_heads)))
    if self.kind == "qwen3_moe":  # each head
      q, k = self._norm(q, f"{name}.q_norm"), self._norm(k, f"{name}.k_norm")
    q, k = self._rotate(q), self._rotate(k)
    out = np.zeros_like(q)
    for head in range(heads):
      shared = head * kv_heads // heads
      score = q[:, head] @ k[:, shared].T / np.sqrt(q.shape[-1])
      score[np.triu_indices(size, 1)] = -np.inf
      score = np.exp(score - score.max(-1, keepdims=True))
      out[:, head] = score / score.sum(-1, keepdims=True) @ v[:, shared]
    return out.reshape(size, -1) @ self._get(f"{name}.o_proj").T

  def _rotate(self, x_SHh):
    size, _, h = x_SHh.shape
    angle = np.arange(size)[:, None] / self.said["rope_theta"] ** (np.arange(0, h, 2) / h)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    first, second = x_SHh[..., :h // 2], x_SHh[..., h // 2:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def balance_loss(experts_LSK, prob_LSE):
  """E Σ f P over all layers at once, f the assignments a token: what transformers reports."""
  n_exp = prob_LSE.shape[-1]
  f = np.bincount(experts_LSK.ravel(), minlength=n_exp) / experts_LSK[..., 0].size
  return n_exp * (f * prob_LSE.mean((0, 1))).sum()
