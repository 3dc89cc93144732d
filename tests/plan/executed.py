"""FLOPs that a compiled step executes, counted from its configuration, and steps to hold it on."""

import dataclasses

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
  """Of matrix products, one step, one device: recomputed ones and those of empty slots, too.

  A sequence is one tile of attention here, which is computed whole, in heads filled up to whole
  lanes: two products forward, seven backward. Full remat computes a layer again but for its last
  product, whose output no gradient needs.
  """
  arch, remat = config.arch, config.execution.remat
  assert remat in ("none", "full") and config.data.seq_len <= 128 and arch.kv_heads == arch.n_heads
  again = remat == "full"
  tokens = config.batch_tokens / n_devices
  slots = expert_capacity(config.moe.capacity_factor, config.group_tokens, arch.n_topk, arch.n_exp)
  rows = slots * arch.n_exp / config.group_tokens  # of experts, a token
  last = arch.d_model * (arch.n_moe_layers * rows * arch.d_expert
                         + arch.n_dense_layers * arch.dense_width)
  layers = (arch.n_layers * 4 * arch.d_model * arch.n_heads * arch.d_head
            + arch.n_moe_layers * arch.d_model * arch.n_exp + 3 * last)
  scores = tokens * arch.n_layers * arch.n_heads * config.data.seq_len * splash.LANES
  head = tokens * arch.d_model * arch.vocab_size
  return 2 * (tokens * (3 * layers + again * (layers - last)) + (9 + 2 * again) * scores
              + 3 * head)
