"""Which meshes, remat policies and microbatches are worth compiling for a cell on a slice.

A coarse model of memory and time ranks every layout that the cell allows; only the most
promising are compiled, and what is recommended is the fastest of those that fit. The model knows
sums of bytes and FLOPs and nothing of schedules, so it prunes and never decides. No JAX here.

Per device, with n devices, p = fsdp * expert, t tokens of a microbatch, c bytes an activation:

    state         16 bytes a parameter (weights, two moments, gradients) / p
    gathered      one layer's weights: experts / expert, all others whole
    kept          a layer's input for each layer and token; with `dots` the projections too, with
                  `rows` what experts received, with `none` everything that a layer makes
    one layer     rows sent to experts and their hidden values, scores of plain attention
    head          logits and their gradient in float32

    arithmetic    training FLOPs, a third more where all is computed again, at half the peak
    all-to-all    each token's slots there and back, forward and backward, over the links
    gathers       weights over fsdp, forward and backward, and their gradients, a microbatch each
    all-reduce    gradients over data; over the network where data crosses slices
"""

import collections
import dataclasses
from collections.abc import Iterator

from moe_jax.arch import count
from moe_jax.config import MeshConfig, RunConfig, resolve_mesh
from moe_jax.errors import FieldError
from moe_jax.grid import Cell
from moe_jax.plan.cells import Plan
from moe_jax.plan.topology import Topology

REMATS = ("none", "dots", "rows", "full")
MICROBATCHES = (1, 2, 4, 8, 16)

_EFFICIENCY = 0.5  # of the peak, by which arithmetic is taken to run
_SLACK = 1.25  # times the memory there is: what the model says needs more is not compiled


@dataclasses.dataclass(frozen=True)
class Layout:
  """A way to run a cell, and what the coarse model says of it.

  Attributes:
    config: with this execution.
    bytes: on one device.
    seconds: of one step.
  """

  config: RunConfig
  bytes: float
  seconds: float

  @property
  def label(self) -> str:
    mesh, execution = self.config.execution.mesh, self.config.execution
    return (f"data{mesh.data}-fsdp{mesh.fsdp}-expert{mesh.expert}-{execution.remat}"
            f"-m{execution.microbatches}")

  @property
  def flags(self) -> str:
    """The overrides that choose it."""
    mesh, execution = self.config.execution.mesh, self.config.execution
    values = {"mesh.data": mesh.data, "mesh.fsdp": mesh.fsdp, "mesh.expert": mesh.expert,
              "remat": execution.remat, "microbatches": execution.microbatches}
    return " ".join(f"--config.execution.{name}={value}" for name, value in values.items())


def layouts(config: RunConfig, topology: Topology) -> list[Layout]:
  """Every layout that the cell allows, the most promising first.

  Those that the coarse model is sure do not fit come last, least memory first.
  """
  found = [Layout(changed, _bytes(changed, topology), _seconds(changed, topology))
           for changed in _allowed(config, topology)]
  there = _SLACK * topology.hardware.device_hbm_bytes
  return sorted(found, key=lambda layout: (layout.bytes > there,
                                           layout.bytes if layout.bytes > there else 0,
                                           layout.seconds, layout.bytes))


def candidates(cell: Cell, topology: Topology, tries: int) -> list[tuple[Layout, Cell]]:
  """The `tries` most promising layouts, as cells that can be planned.

  At most half of them share the size of the `expert` axis, so that the compiler's verdict
  compares what the model is least sure of.

  Raises:
    FieldError: the cell allows no layout on these devices.
  """
  ranked = layouts(cell.config, topology)
  if not ranked:
    resolve_mesh(cell.config, topology.devices, topology.n_slices)  # says why its own does not
    raise FieldError("topology", topology.label, f"{cell.name} has no layout on its "
                     f"{topology.devices} devices")
  chosen, taken = [], collections.Counter()
  for layout in ranked:
    expert = layout.config.execution.mesh.expert
    if taken[expert] < max(1, tries // 2):
      taken[expert] += 1
      chosen.append(layout)
  return [(layout, dataclasses.replace(cell, name=f"{cell.name} {layout.label}",
                                       config=layout.config)) for layout in chosen[:tries]]


def best(tried: list[tuple[Layout, Plan]]) -> Plan:
  """The fastest that fits; where none does, the first."""
  fitting = [plan for _, plan in tried if plan.fits]
  return min(fitting, key=lambda plan: plan.seconds) if fitting else tried[0][1]


def verdict(cell: Cell, tried: list[tuple[Layout, Plan]]) -> str:
  """The recommendation and the runners-up, a line each."""
  fitting = sorted(((plan.seconds, layout) for layout, plan in tried if plan.fits),
                   key=lambda pair: pair[0])
  if not fitting:
    return f"{cell.name}: none of the {len(tried)} layouts that were compiled fits"
  lines = [f"{cell.name}: {fitting[0][0] * 1e3:.1f} ms a step with {fitting[0][1].flags}"]
  lines += [f"  {seconds / fitting[0][0] - 1:+.1%} with {layout.label}"
            for seconds, layout in fitting[1:]]
  return "\n".join(lines)


def _allowed(config: RunConfig, topology: Topology) -> Iterator[RunConfig]:
  n = topology.devices
  sizes = [size for size in range(1, n + 1) if n % size == 0]
  for expert in sizes:
    for fsdp in (size for size in sizes if n % (size * expert) == 0):
      mesh = MeshConfig(n // (fsdp * expert), fsdp, expert)
      for microbatches in MICROBATCHES:
        for remat in REMATS:
          try:
            changed = dataclasses.replace(config, execution=dataclasses.replace(
                config.execution, mesh=mesh, remat=remat, microbatches=microbatches))
            resolve_mesh(changed, n, topology.n_slices)
          except FieldError:
            continue
          yield changed


def _width(config: RunConfig) -> int:
  return count.dtype_bytes(config.model.compute_dtype)


def _slots_per_token(config: RunConfig) -> float:
  return config.arch.n_topk * (config.moe.capacity_factor if config.moe.dispatch == "capacity"
                               else 1.0)


def _weights(config: RunConfig) -> tuple[int, int]:
  """(parameters of all routed experts, of all else with embedding and head)."""
  arch = config.arch
  routed = count.n_total(arch) - count.n_parameters(arch, 0)
  return routed, count.n_total_with_embedding(arch) - routed


def _bytes(config: RunConfig, topology: Topology) -> float:
  arch, execution = config.arch, config.execution
  mesh, width = execution.mesh, _width(config)
  routed, other = _weights(config)
  tokens = config.batch_tokens / topology.devices / execution.microbatches
  state = 16 * (routed + other) / (mesh.fsdp * mesh.expert)
  gathered = width * (routed / mesh.expert + other) / arch.n_layers
  rows = _slots_per_token(config) * (4 * arch.d_model + 4 * arch.d_expert)
  projections = 2 * arch.d_model + 2 * (arch.n_heads + arch.kv_heads) * arch.d_head
  scores = 2 * 4 * arch.n_heads * config.data.seq_len
  layer = tokens * (width * (rows + projections) + scores)
  received = _slots_per_token(config) * arch.d_model + arch.n_heads * arch.d_head
  kept = {"full": 0, "rows": received * width, "dots": projections * width,
          "none": layer / tokens}[execution.remat]
  activations = arch.n_layers * tokens * (width * arch.d_model + kept)
  return state + gathered + activations + layer + 2 * 4 * tokens * arch.vocab_size


def _seconds(config: RunConfig, topology: Topology) -> float:
  arch, execution, chip = config.arch, config.execution, topology.hardware
  mesh, width = execution.mesh, _width(config)
  routed, other = _weights(config)
  tokens = config.batch_tokens / topology.devices
  again = {"none": 0.0, "dots": 0.8, "rows": 0.6, "full": 1.0}[execution.remat]
  if execution.microbatches > 1:
    again = max(again, 1.0)  # a microbatch's forward pass is computed again as a whole
  flops = tokens * count.forward_flops_per_token(arch, config.data.seq_len) * (3 + again)
  arithmetic = flops / (_EFFICIENCY * chip.device_bf16_flops)
  link = chip.link_bytes_per_second / chip.devices_per_chip
  rows = tokens * _slots_per_token(config) * arch.d_model * width * arch.n_moe_layers
  exchanges = 4 + (execution.remat in ("dots", "full"))  # the way there is travelled again
  exchange = exchanges * rows * (mesh.expert - 1) / mesh.expert / link
  share = (mesh.fsdp - 1) / mesh.fsdp
  gathers = (2 + again) * execution.microbatches * width * share * (
      routed / mesh.expert + other) / link
  per_device = width * (routed + other) / (mesh.fsdp * mesh.expert)
  slow = topology.n_slices > 1
  reduce = 2 * per_device * (mesh.data > 1) / (
      chip.dcn_bytes_per_second / chip.devices_per_chip if slow else link)
  # Of what could overlap, half does.
  moved = exchange + gathers
  return max(arithmetic, moved) + 0.5 * min(arithmetic, moved) + reduce
