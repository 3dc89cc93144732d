"""FLOPs that a compiled step executes, counted from its configuration, and steps to hold it on."""

import dataclasses

from moe_jax.arch import count
from moe_jax.config import (
    Architecture,
    DataConfig,
    ExecutionConfig,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    RunConfig,
    TrainConfig,
)
from moe_jax.model import splash
from moe_jax.moe.dispatch import expert_capacity

_MOE = RunConfig(
    arch=Architecture(n_layers=2, d_model=128, d_expert=128, n_exp=8, n_topk=2, n_heads=2),
    moe=MoEConfig(capacity_factor=2.0), model=ModelConfig(compute_dtype="bfloat16"),
    data=DataConfig(seq_len=128), train=TrainConfig(steps=100, batch_size=16, warmup_steps=2),
    execution=ExecutionConfig(remat="full", mesh=MeshConfig(expert=4)))
STEPS = {
    "moe-full": _MOE,
    "dense-none": dataclasses.replace(
        _MOE, arch=dataclasses.replace(_MOE.arch, n_dense_layers=2),
        execution=ExecutionConfig(remat="none", mesh=MeshConfig(fsdp=4))),
}


def executed_flops(config: RunConfig, n_devices: int) -> float:
  """Of matrix products, one step, one device: the analytic count, and what is executed beside it.

  Beside it are the rows of empty slots, recomputation (full remat computes a layer again but for
  its last product, whose output no gradient needs), and attention: a sequence is one tile here,
  which is computed whole, in heads filled up to whole lanes: two products forward, seven backward.
  """
  arch, seq_len, remat = config.arch, config.data.seq_len, config.execution.remat
  assert remat in ("none", "full") and seq_len <= 128
  again = remat == "full"
  causal = 2 * arch.n_layers * arch.n_heads * arch.d_head * (seq_len + 1)
  slots = expert_capacity(config.moe.capacity_factor, config.group_tokens, arch.n_topk, arch.n_exp)
  rows = slots * arch.n_exp / config.group_tokens  # of experts, a token
  one_product = 2 * arch.d_model * arch.d_expert
  empty = arch.n_moe_layers * (rows - arch.n_topk) * 3 * one_product
  forward = count.forward_flops_per_token(arch, seq_len) - causal + empty
  last = (arch.n_moe_layers * rows * one_product
          + arch.n_dense_layers * 2 * arch.d_model * arch.dense_width)
  head = 2 * arch.d_model * arch.vocab_size
  attention = 2 * (9 + 2 * again) * arch.n_layers * arch.n_heads * seq_len * splash.LANES
  tokens = config.batch_tokens / n_devices
  return tokens * (3 * forward + again * (forward - head - last) + attention)
