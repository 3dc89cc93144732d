"""The experts, and where they live: `shard_map` over the mesh with all-to-all on `expert`.

Tokens are split over all three mesh axes. Each device routes its own tokens, in whole routing
groups, so which tokens drop does not depend on the mesh. The rows of an expert travel to the
device that holds it and back by all-to-all over the `expert` axis; each device's share of the
expert weights is gathered over `fsdp` just before it is used.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from moe_jax.mesh import BATCH_AXES, DATA, EXPERT, FSDP, param_spec, platform_of
from moe_jax.moe.dispatch import (
    RunExperts,
    capacity_dispatch,
    expert_capacity,
    reference_dispatch,
)
from moe_jax.moe.dropless import RunGroups, dropless_dispatch, packed_dispatch
from moe_jax.moe.expert_choice import (
    choice_dispatch,
    choice_sums,
    choose_tokens,
    reference_choice_dispatch,
)
from moe_jax.moe.grouped_matmul import SPARE_ROWS, grouped_matmul
from moe_jax.moe.ragged_exchange import exchange, plan_exchange
from moe_jax.moe.router import (
    RouterSums,
    Routing,
    jitter_noise,
    route,
    router_logits,
    router_sums,
)
from moe_jax.moe.swiglu_blocks import swiglu_blocks
from moe_jax.products import cpu_matmul, precision_of


class Experts(NamedTuple):
  """Weights of SwiGLU experts without bias: w_down(silu(x w_gate) * (x w_up))."""

  w_gate_EDF: jax.Array
  w_up_EDF: jax.Array
  w_down_EFD: jax.Array


# Logical axes of the experts' weights, which mesh.RULES maps to the mesh.
EXPERT_AXES = Experts(("experts", "expert_d_model", None), ("experts", "expert_d_model", None),
                      ("experts", None, "expert_d_model"))


SAVED = "rows"  # name of the rows that experts received, for what remat keeps

# Groups of experts of a device that travel apart. More of them overlap better, and are a longer
# program.
_MOST_EXCHANGES = 8

# For each assignment; see _packs. Between what was measured, on two cores: 1.25 and 2.
_SLOTS_TO_PACK = 1.5


class Semantics(NamedTuple):
  """What routing and dispatch mean, resolved from a RunConfig; static under jit.

  Attributes:
    n_topk: experts a token.
    norm_topk_prob: whether the chosen weights are divided by their sum.
    group_tokens: tokens in a routing group.
    capacity: slots per expert and group; None where nothing is dropped. Experts that choose their
      tokens have slots of their own number: of them it says only whether they are dispatched
      by index or by the reference.
    router: of MoEConfig.
    jitter: of MoEConfig.
    drop_order: of MoEConfig.
    dropless: whether, without a capacity, assignments are sorted by expert; the reference
      runs every expert on every token instead.
  """

  n_topk: int
  norm_topk_prob: bool
  group_tokens: int
  capacity: int | None
  router: str = "softmax"
  jitter: float = 0.0
  drop_order: str = "position"
  dropless: bool = False

  @property
  def reference(self) -> bool:
    return self.capacity is None and not self.dropless

  @classmethod
  def of(cls, config) -> "Semantics":
    arch, moe = config.arch, config.moe
    capacity = expert_capacity(moe.capacity_factor, config.group_tokens, arch.n_topk,
                               arch.n_exp)
    return cls(arch.n_topk, moe.norm_topk_prob, config.group_tokens,
               capacity if moe.dispatch == "capacity" else None,
               moe.router, moe.jitter, moe.drop_order, moe.dispatch == "dropless")


def swiglu(x_ERD: jax.Array, weight_ER: jax.Array | None = None, *, experts: Experts,
           platform: str) -> jax.Array:
  """Runs each expert on its rows, in the type of the rows; float32 is meant as it says.

  With weights, each row of the result is times its weight. The platform of the devices decides how
  it is done.
  """
  matmul = cpu_matmul if platform == "cpu" else functools.partial(
      jnp.matmul, precision=precision_of(x_ERD.dtype, platform))
  gate_EDF, up_EDF, down_EFD = (w.astype(x_ERD.dtype) for w in experts)
  # Side by side, so that the rows are read once for both.
  gate_up_ERF = matmul(x_ERD, jnp.concatenate([gate_EDF, up_EDF], axis=-1))
  return matmul(gated(*jnp.split(gate_up_ERF, 2, axis=-1), weight_ER), down_EFD)


def grouped_swiglu(x_SD: jax.Array, weight_S: jax.Array, size_E: jax.Array, experts: Experts,
                   platform: str, usual_rows: int | None = None) -> jax.Array:
  """`swiglu` on rows sorted by expert, in the layout of grouped_matmul.py."""
  gate_EDF, up_EDF, down_EFD = (w.astype(x_SD.dtype) for w in experts)
  gate_up_EDH = jnp.concatenate([gate_EDF, up_EDF], axis=-1)
  if platform == "cpu":
    return swiglu_blocks(x_SD, weight_S, gate_up_EDH, down_EFD, size_E)
  multiply = functools.partial(grouped_matmul, size_E=size_E, platform=platform,
                               usual_rows=usual_rows)
  gate_up_SH = multiply(x_SD, gate_up_EDH)
  return multiply(gated(*jnp.split(gate_up_SH, 2, axis=-1), weight_S), down_EFD)


def gated(gate: jax.Array, up: jax.Array, weight: jax.Array | None = None) -> jax.Array:
  """silu(gate) * up, times the row's weight, in float32 and rounded once to their type.

  The weight enters before the last product and not after it: the gradient of the weights then
  needs no output of that product, which need not be kept nor computed again.
  """
  hidden = jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)
  if weight is not None:
    hidden *= weight[..., None]
  return hidden.astype(gate.dtype)


def moe_layer(x_TD: jax.Array, w_router_DE: jax.Array, run_experts: RunExperts | RunGroups,
              semantics: Semantics, counted_T: jax.Array | None = None,
              bias_E: jax.Array | None = None, noise_TD: jax.Array | None = None,
              n_devices: int = 1, packed: bool = False) -> tuple[jax.Array, RouterSums]:
  """Routes, dispatches, runs and combines the tokens of one device.

  `run_experts` takes rows as the dispatch gives them, dropless and `packed` with the sizes of the
  groups; `n_devices` is over how many the experts lie. Packed, which only experts on one device
  can be, a capacity leaves no rows for the slots that stay empty.
  The router sees the tokens times `noise_TD`; for the other arguments see sharded_moe_layer.
  """
  assert not packed or n_devices == 1, "packed rows are in no order that devices could exchange"
  assert (bias_E is not None) == (semantics.router == "sigmoid"), "the bias is of sigmoid scores"
  seen_TD = x_TD if noise_TD is None else x_TD * noise_TD
  in_order = functools.partial(_in_order, run_experts, n_devices)
  if semantics.router == "expert_choice":
    with jax.named_scope("route"):
      choice = choose_tokens(router_logits(seen_TD, w_router_DE), semantics.n_topk,
                             semantics.group_tokens, counted_T)
    dispatch = reference_choice_dispatch if semantics.capacity is None else choice_dispatch
    return dispatch(x_TD, choice, in_order), choice_sums(choice, counted_T)

  with jax.named_scope("route"):
    routing = route(seen_TD, w_router_DE, semantics.n_topk, semantics.norm_topk_prob, bias_E)
  if semantics.dropless:
    y_TD, dropped_T = dropless_dispatch(x_TD, routing, run_experts)
  elif semantics.capacity is None:
    y_TD, dropped_T = reference_dispatch(x_TD, routing, in_order)
  else:
    dispatch = packed_dispatch if packed else functools.partial(capacity_dispatch,
                                                                n_devices=n_devices)
    y_TD, dropped_T = dispatch(x_TD, routing, run_experts, group_tokens=semantics.group_tokens,
                               capacity=semantics.capacity,
                               priority_TK=priority(routing, semantics, counted_T))
  return y_TD, router_sums(routing, dropped_T, counted_T)


def _in_order(run_experts: RunExperts, n_devices: int, x_ERD: jax.Array) -> jax.Array:
  """`run_experts` for rows in the order of the experts, whatever the order it takes."""
  n_exp, *rest = x_ERD.shape
  x_PnRD = x_ERD.reshape(n_devices, n_exp // n_devices, *rest).swapaxes(0, 1)
  y_PnRD = run_experts(x_PnRD.reshape(x_ERD.shape)).reshape(x_PnRD.shape)
  return y_PnRD.swapaxes(0, 1).reshape(x_ERD.shape)


def priority(routing: Routing, semantics: Semantics,
             counted_T: jax.Array | None) -> jax.Array | None:
  """Who is served first at an expert, for capacity_dispatch; padding last."""
  if semantics.drop_order == "position":
    return None
  weight_TK = jax.lax.stop_gradient(routing.weight_TK)
  return weight_TK if counted_T is None else jnp.where(counted_T[:, None], weight_TK, -1)


def sharded_moe_layer(x_BSD: jax.Array, w_router_DE: jax.Array, experts: Experts,
                      semantics: Semantics, mesh: Mesh,
                      counted_BS: jax.Array | None = None,
                      bias_E: jax.Array | None = None,
                      noise_key_B: jax.Array | None = None) -> tuple[jax.Array, RouterSums]:
  """`moe_layer` on a mesh.

  Args:
    x_BSD: tokens, B split over all mesh axes.
    w_router_DE: router weights, the same on every device.
    experts: E split over `expert`, D over `fsdp`.
    semantics: see `Semantics`.
    mesh: with the axes data, fsdp, expert.
    counted_BS: bool, False for padding, which the sums leave out; None counts all.
    bias_E: selection bias of sigmoid scores, the same on every device; None for a softmax.
    noise_key_B: a random key for each row, from which the jitter of what its router sees
      follows; None (as in evaluation) means no jitter.

  Returns:
    y_BSD split as x_BSD is, and sums over all tokens of the batch.
  """
  if counted_BS is None:
    counted_BS = jnp.ones(x_BSD.shape[:2], bool)
  specs = Experts(*(param_spec(axes) for axes in EXPERT_AXES))

  @functools.partial(jax.shard_map, mesh=mesh,
                     in_specs=(P(BATCH_AXES), P(), specs, P(BATCH_AXES), P(), P(BATCH_AXES)),
                     out_specs=(P(BATCH_AXES), P()))
  def on_device(x_bSD, w_router_DE, experts_eDF, counted_bS, bias_E, noise_key_b):
    # Cast first: half the bytes travel when the tokens are bfloat16.
    dtype = jnp.float32 if semantics.reference else x_bSD.dtype
    local = Experts(*(_all_gather(w.astype(dtype), FSDP, axes.index("expert_d_model"))
                      for w, axes in zip(experts_eDF, EXPERT_AXES, strict=True)))
    # Each device has its own rows: its share of the weights' gradient is its own, too.
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
    y_TD, sums = moe_layer(x_TD, w_router_DE,
                           run_groups if semantics.dropless or packed else run_experts, semantics,
                           counted_bS.ravel(), bias_E, noise_TD, mesh.shape[EXPERT], packed)
    return y_TD.reshape(x_bSD.shape), jax.lax.psum(sums, (DATA, FSDP, EXPERT))

  return on_device(x_BSD, w_router_DE, experts, counted_BS, bias_E, noise_key_B)


def _packs(semantics: Semantics, n_exp: int, mesh: Mesh) -> bool:
  """Whether only rows of slots in use are multiplied: on a CPU where at least a third is empty.

  There the blocks of swiglu_blocks.py, which have no empty rows but are small products, are faster
  (not at a capacity factor of 1.25), and hold less memory.
  """
  if semantics.capacity is None or semantics.router == "expert_choice":
    return False
  slots, assigned = semantics.capacity * n_exp, semantics.group_tokens * semantics.n_topk
  return (platform_of(mesh) == "cpu" and mesh.shape[EXPERT] == 1
          and slots >= _SLOTS_TO_PACK * assigned)


def _run_experts(x_ERD: jax.Array, weight_ER: jax.Array | None, experts: Experts,
                 mesh: Mesh) -> jax.Array:
  """Rows of one device through experts of all devices along `expert`.

  Experts that hold the same place on their devices come together (capacity_dispatch's order).
  Each such group travels by an exchange of its own, which neither needs its rows in another
  order nor leaves them in one, and the next can travel while one is multiplied.
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
  """How many groups of equal size the experts of a device travel in."""
  return max(n for n in range(1, _MOST_EXCHANGES + 1) if n_here % n == 0)


def _exchange(x: jax.Array, n_devices: int, back: bool = False) -> jax.Array:
  """[places * devices, R, D] on each device -> [places, devices * R, D]; `back` undoes it."""
  *_, d = x.shape
  places = x.shape[0] if back else x.shape[0] // n_devices
  x_PnRD = jax.lax.all_to_all(x.reshape(places, n_devices, -1, d), EXPERT, 1, 1, tiled=True)
  return x_PnRD.reshape((places * n_devices, -1, d) if back else (places, -1, d))


def _saved(x_eRD: jax.Array) -> jax.Array:
  """Names the rows that experts received, for what remat keeps."""
  return checkpoint_name(x_eRD, SAVED)


def _run_groups(x_SD: jax.Array, weight_S: jax.Array, size_E: jax.Array, experts: Experts,
                n_topk: int, mesh: Mesh) -> jax.Array:
  """Rows of one device, sorted by expert, through experts of all devices along `expert`."""
  platform, n_devices = platform_of(mesh), mesh.shape[EXPERT]
  if n_devices == 1:
    return grouped_swiglu(_saved(x_SD), weight_S, size_E, experts, platform)
  plan = plan_exchange(jax.lax.all_gather(size_E, EXPERT), jax.lax.axis_index(EXPERT))
  n_sent = x_SD.shape[0] - SPARE_ROWS  # as many arrive, on average
  n_tokens = n_sent // n_topk
  n_arriving = n_devices * n_tokens * min(n_topk, plan.size_e.shape[0])  # at most
  there = functools.partial(exchange, way=plan.there, way_back=plan.back,
                            n_rows=n_arriving + SPARE_ROWS, axis_name=EXPERT, platform=platform)
  x_RD, weight_R = there(x_SD), there(weight_S)
  y_RD = grouped_swiglu(_saved(x_RD), weight_R, plan.size_e, experts, platform, n_sent)
  return exchange(y_RD, plan.back, plan.there, x_SD.shape[0], EXPERT, platform)


def _all_gather(x, axis_name, axis):
  return jax.lax.all_gather(x, axis_name, axis=axis, tiled=True)
