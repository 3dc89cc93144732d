"""A coarse model of memory and step time, to rank configurations before compiling. No JAX here.

It only sums bytes and FLOPs and does not model schedules, so it prunes but never decides.

Memory per device, with p = fsdp * expert:

    state         16 bytes per parameter (weights, two moments, gradients) / p, and 4 more to
                  accumulate gradients if there is more than one microbatch
    gathered      one layer's weights: those of the experts / expert, all others whole
    kept          each layer's input for each token of a microbatch; with `dots` the projections
                  too, with `rows` the rows that experts received and the attention's output, with
                  `none` all activations of the layer
    one layer     rows sent to experts and their hidden activations, projections
    head          a chunk of logits and their gradient, and the head's gradient, in float32

Time per step:

    arithmetic    training FLOPs, a third more with full recomputation, at half the peak
    all-to-all    each token's slots there and back, forward and backward, over the links
    gathers       weights over fsdp, once more if recomputed, and gradients, for each microbatch
    all-reduce    gradients over data; over the network if data crosses slices
"""

import math

from moe_jax.arch import count
from moe_jax.config import RunConfig
from moe_jax.plan.topology import Topology

_EFFICIENCY = 0.5  # assumed fraction of peak FLOP/s
_LOGITS_BYTES = 2**29  # of one chunk on an accelerator (model/cross_entropy.py)


def _width(config: RunConfig) -> int:
  return count.dtype_bytes(config.model.compute_dtype)


def _slots_per_token(config: RunConfig) -> float:
  drops = config.moe.dispatch == "capacity" and config.moe.router != "expert_choice"
  return config.arch.n_topk * (config.moe.capacity_factor if drops else 1.0)


def _weights(config: RunConfig) -> tuple[int, int]:
  """(parameters of all routed experts, all others including embedding and head)."""
  arch = config.arch
  routed = count.n_total(arch) - count.n_parameters(arch, 0)
  return routed, count.n_total_with_embedding(arch) - routed


def device_bytes(config: RunConfig, topology: Topology) -> float:
  """Estimated memory of one device, in bytes."""
  arch, execution = config.arch, config.execution
  mesh, width = execution.mesh, _width(config)
  routed, other = _weights(config)
  tokens = config.batch_tokens / topology.devices / execution.microbatches
  per_parameter = 16 if execution.microbatches == 1 else 20
  state = per_parameter * (routed + other) / (mesh.fsdp * mesh.expert)
  gathered = width * (routed / mesh.expert + other) / arch.n_layers
  rows = _slots_per_token(config) * (4 * arch.d_model + 4 * arch.d_expert)
  projections = 2 * arch.d_model + 2 * (arch.n_heads + arch.kv_heads) * arch.d_head
  layer = tokens * width * (rows + projections)
  received = _slots_per_token(config) * arch.d_model + arch.n_heads * arch.d_head
  kept = {"full": 0, "rows": received * width, "dots": projections * width,
          "none": layer / tokens}[execution.remat]
  activations = arch.n_layers * tokens * (width * arch.d_model + kept)
  logits = min(4 * tokens * arch.vocab_size, _LOGITS_BYTES)
  head = 2 * logits + 4 * arch.d_model * arch.vocab_size
  return state + gathered + activations + layer + head


def _seconds_a_byte(expert: int, topology: Topology) -> float:
  """Seconds per byte of an all-to-all over `expert` devices, by the formula of collectives.py.

  Assumes a block of the torus that is as close to a cube as powers of two allow.
  """
  if expert == 1:
    return 0.0
  dimensions, chip = len(topology.shape), topology.hardware
  longest = 2**math.ceil(math.log2(expert) / dimensions)
  one_way = chip.link_bytes_per_second / chip.devices_per_chip / (2 * dimensions)
  return longest / (4 * one_way)


def step_seconds(config: RunConfig, topology: Topology) -> float:
  """Estimated time of one step."""
  arch, execution, chip = config.arch, config.execution, topology.hardware
  mesh, width = execution.mesh, _width(config)
  routed, other = _weights(config)
  tokens = config.batch_tokens / topology.devices
  again = {"none": 0.0, "dots": 0.8, "rows": 0.6, "full": 1.0}[execution.remat]
  if execution.microbatches > 1:
    again = max(again, 1.0)  # the whole forward pass of a microbatch is recomputed
  flops = tokens * count.forward_flops_per_token(arch, config.data.seq_len) * (3 + again)
  arithmetic = flops / (_EFFICIENCY * chip.device_bf16_flops)
  link = chip.link_bytes_per_second / chip.devices_per_chip
  rows = tokens * _slots_per_token(config) * arch.d_model * width * arch.n_moe_layers
  exchanges = 4 + (execution.remat in ("dots", "full"))  # recomputation repeats the dispatch
  exchange = exchanges * rows * _seconds_a_byte(mesh.expert, topology)
  share = (mesh.fsdp - 1) / mesh.fsdp
  gathers = (2 + again) * execution.microbatches * width * share * (
      routed / mesh.expert + other) / link
  per_device = width * (routed + other) / (mesh.fsdp * mesh.expert)
  slow = topology.n_slices > 1
  data = topology.devices // (mesh.fsdp * mesh.expert)  # mesh.data may be -1: whatever is left
  reduce = 2 * per_device * (data > 1) / (
      chip.device_dcn_bytes_per_second if slow else link)
  # Assume half of the possible overlap is achieved.
  moved = exchange + gathers
  return max(arithmetic, moved) + 0.5 * min(arithmetic, moved) + reduce
