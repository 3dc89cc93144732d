"""Expert parallelism: the MoE layer in `shard_map` over the mesh, with all-to-all on `expert`.

Tokens are split over all three mesh axes. Each device routes its own tokens, in whole routing
groups, so which tokens drop does not depend on the mesh. Rows travel to the device that holds
their expert, and back, by all-to-all over the `expert` axis; each device's expert weights are
all-gathered over `fsdp` just before they are used.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from moe_jax.mesh import BATCH_AXES, DATA, EXPERT, FSDP, param_spec, platform_of
from moe_jax.moe.experts import EXPERT_AXES, Experts, grouped_swiglu, swiglu
from moe_jax.moe.grouped_matmul import SPARE_ROWS
from moe_jax.moe.layer import Semantics, moe_layer
from moe_jax.moe.ragged_exchange import exchange, plan_exchange
from moe_jax.moe.router import RouterSums, jitter_noise

SAVED = "rows"  # checkpoint_name of the rows that experts received, for remat policies

# Upper bound on the all-to-alls that a layer's exchange is split into: more of them overlap better
# with the matrix products but make the program longer.
_MOST_EXCHANGES = 8

# Slots per assignment above which packing pays off (see _packs). Measured on two cores: packing
# is slower at 1.25 and faster at 2.
_SLOTS_TO_PACK = 1.5


def sharded_moe_layer(x_BSD: jax.Array, w_router_DE: jax.Array, experts: Experts,
                      semantics: Semantics, mesh: Mesh,
                      counted_BS: jax.Array | None = None,
                      bias_E: jax.Array | None = None,
                      noise_key_B: jax.Array | None = None) -> tuple[jax.Array, RouterSums]:
  """`moe_layer` on a mesh.

  Args:
    x_BSD: tokens, B split over all mesh axes.
    w_router_DE: router weights, replicated.
    experts: E split over `expert`, D over `fsdp`.
    semantics: see `Semantics`.
    mesh: with the axes data, fsdp, expert.
    counted_BS: bool, False for padding, which the sums omit; None counts all.
    bias_E: selection bias for sigmoid scores, replicated; None for the other routers.
    noise_key_B: a random key per row, for the jitter of the router's inputs; None (as in
      evaluation) means no jitter.

  Returns:
    y_BSD split like x_BSD, and sums over all tokens of the batch.
  """
  if counted_BS is None:
    counted_BS = jnp.ones(x_BSD.shape[:2], bool)
  specs = Experts(*(param_spec(axes) for axes in EXPERT_AXES))

  @functools.partial(jax.shard_map, mesh=mesh,
                     in_specs=(P(BATCH_AXES), P(), specs, P(BATCH_AXES), P(), P(BATCH_AXES)),
                     out_specs=(P(BATCH_AXES), P()))
  def on_device(x_bSD, w_router_DE, experts_eDF, counted_bS, bias_E, noise_key_b):
    # Cast before the all-gather: with bfloat16 tokens it then moves half the bytes.
    dtype = jnp.float32 if semantics.dispatch == "reference" else x_bSD.dtype
    local = Experts(*(jax.lax.all_gather(w.astype(dtype), FSDP, tiled=True,
                                         axis=axes.index("expert_d_model"))
                      for w, axes in zip(experts_eDF, EXPERT_AXES, strict=True)))
    # Rows differ along `data`, and so do the weights' gradients before they are summed.
    local = jax.tree.map(lambda w: jax.lax.pcast(w, DATA, to="varying"), local)

    def run_groups(x_SD, weight_S, size_E):
      return _run_groups(x_SD, weight_S, size_E, local, semantics.n_topk, mesh)

    def run_experts(x_ERD, weight_ER=None):
      return _run_experts(x_ERD, weight_ER, local, mesh)

    x_TD = x_bSD.reshape(-1, x_bSD.shape[-1])
    noise_TD = None
    if noise_key_b is not None:
      noise_TD = jitter_noise(noise_key_b, *x_bSD.shape[1:], semantics.jitter).reshape(x_TD.shape)
    packed = _packs(semantics, w_router_DE.shape[1], mesh)
    grouped = packed or semantics.dispatch == "dropless"
    y_TD, sums = moe_layer(x_TD, w_router_DE, run_groups if grouped else run_experts, semantics,
                           counted_bS.ravel(), bias_E, noise_TD, mesh.shape[EXPERT], packed)
    return y_TD.reshape(x_bSD.shape), jax.lax.psum(sums, (DATA, FSDP, EXPERT))

  return on_device(x_BSD, w_router_DE, experts, counted_BS, bias_E, noise_key_B)


def _packs(semantics: Semantics, n_exp: int, mesh: Mesh) -> bool:
  """Whether to multiply only the rows of used slots: on a CPU, if at least a third are empty.

  There swiglu_blocks.py, which skips empty rows at the price of smaller products, is faster (but
  not at a capacity factor of 1.25) and uses less memory.
  """
  if semantics.dispatch != "capacity" or semantics.router == "expert_choice":
    return False
  slots, assigned = semantics.capacity * n_exp, semantics.group_tokens * semantics.n_topk
  return (platform_of(mesh) == "cpu" and mesh.shape[EXPERT] == 1
          and slots >= _SLOTS_TO_PACK * assigned)


def _run_experts(x_ERD: jax.Array, weight_ER: jax.Array | None, experts: Experts,
                 mesh: Mesh) -> jax.Array:
  """Runs one device's rows through the experts of all devices along `expert`.

  Experts with the same local index are adjacent (the order of capacity_dispatch). They are
  exchanged in groups, one all-to-all each: no rows need to be transposed before or after, and the
  next exchange can overlap with the products of the previous one.
  """
  platform, n_devices = platform_of(mesh), mesh.shape[EXPERT]
  if n_devices == 1:
    return swiglu(_saved(x_ERD), weight_ER, experts=experts, platform=platform)
  n_here = experts.w_gate_EDF.shape[0]
  split = functools.partial(jnp.split, indices_or_sections=n_exchanges(n_here))
  there = functools.partial(_exchange, n_devices=n_devices)
  weights = [None] * n_exchanges(n_here) if weight_ER is None else split(
      there(weight_ER[..., None])[..., 0])
  outputs = []
  for x_PRD, weight_eR, *part in zip(split(x_ERD), weights, *map(split, experts), strict=True):
    y_eRD = swiglu(_saved(there(x_PRD)), weight_eR, experts=Experts(*part), platform=platform)
    outputs.append(_exchange(y_eRD, n_devices, back=True))
  return jnp.concatenate(outputs)


def n_exchanges(n_here: int) -> int:
  """Number of equal groups in which a device's experts are exchanged."""
  return max(n for n in range(1, _MOST_EXCHANGES + 1) if n_here % n == 0)


def _exchange(x: jax.Array, n_devices: int, back: bool = False) -> jax.Array:
  """All-to-all: [places * devices, R, D] on each device -> [places, devices * R, D].

  A place is an expert's local index. `back` is the inverse.
  """
  *_, d = x.shape
  places = x.shape[0] if back else x.shape[0] // n_devices
  x_PnRD = jax.lax.all_to_all(x.reshape(places, n_devices, -1, d), EXPERT, 1, 1, tiled=True)
  return x_PnRD.reshape((places * n_devices, -1, d) if back else (places, -1, d))


def _saved(x_eRD: jax.Array) -> jax.Array:
  """Names the rows that experts received, for remat policies."""
  return checkpoint_name(x_eRD, SAVED)


def _run_groups(x_SD: jax.Array, weight_S: jax.Array, size_E: jax.Array, experts: Experts,
                n_topk: int, mesh: Mesh) -> jax.Array:
  """Runs one device's rows, sorted by expert, through the experts of all devices along `expert`."""
  platform, n_devices = platform_of(mesh), mesh.shape[EXPERT]
  if n_devices == 1:
    return grouped_swiglu(_saved(x_SD), weight_S, size_E, experts, platform)
  plan = plan_exchange(jax.lax.all_gather(size_E, EXPERT), jax.lax.axis_index(EXPERT))
  n_sent = x_SD.shape[0] - SPARE_ROWS  # also the average number of rows that arrive
  n_tokens = n_sent // n_topk
  n_arriving = n_devices * n_tokens * min(n_topk, plan.size_e.shape[0])  # upper bound
  there = functools.partial(exchange, way=plan.there, way_back=plan.back,
                            n_rows=n_arriving + SPARE_ROWS, axis_name=EXPERT, platform=platform)
  x_RD, weight_R = there(x_SD), there(weight_S)
  y_RD = grouped_swiglu(_saved(x_RD), weight_R, plan.size_e, experts, platform, n_sent)
  return exchange(y_RD, plan.back, plan.there, x_SD.shape[0], EXPERT, platform)
