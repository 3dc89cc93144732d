"""Searches for the fastest mesh, remat policy and number of microbatches of a cell on a slice.

A coarse model of memory and time ranks every layout that the cell allows; only the most promising
are compiled, and the fastest of those that fit is recommended. The model only sums bytes and FLOPs
and does not model schedules, so it prunes but never decides. No JAX here.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterator, Sequence

from moe_jax.config import MeshConfig, RunConfig, resolve_mesh
from moe_jax.errors import FieldError
from moe_jax.grid import Cell
from moe_jax.plan import coarse
from moe_jax.plan.cells import Plan
from moe_jax.plan.topology import Topology

REMATS = ("none", "dots", "rows", "full")
MICROBATCHES = (1, 2, 4, 8, 16)

_SLACK = 1.25  # a layout that the model puts above this multiple of the memory ranks last


@dataclasses.dataclass(frozen=True)
class Layout:
  """A way to run a cell, with the estimates of the coarse model.

  Attributes:
    config: the cell's configuration with this execution.
    bytes: estimated memory of one device.
    seconds: estimated time of one step.
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
    """The command-line overrides that select this layout."""
    mesh, execution = self.config.execution.mesh, self.config.execution
    values = {"mesh.data": mesh.data, "mesh.fsdp": mesh.fsdp, "mesh.expert": mesh.expert,
              "remat": execution.remat, "microbatches": execution.microbatches}
    return " ".join(f"--config.execution.{name}={value}" for name, value in values.items())


def layouts(config: RunConfig, topology: Topology) -> list[Layout]:
  """Returns every layout that the cell allows, most promising first.

  Those that clearly do not fit by the coarse model come last, least memory first.
  """
  found = [Layout(changed, coarse.device_bytes(changed, topology),
                  coarse.step_seconds(changed, topology))
           for changed in _allowed(config, topology)]
  there = _SLACK * topology.hardware.program_hbm_bytes
  return sorted(found, key=lambda layout: (layout.bytes > there,
                                           layout.bytes if layout.bytes > there else 0,
                                           layout.seconds, layout.bytes))


def candidates(cell: Cell, topology: Topology, tries: int) -> list[tuple[Layout, Cell]]:
  """Returns the `tries` most promising layouts, as cells that can be planned.

  At most half of them share one size of the `expert` axis if there are several, so that the
  compiler gets to compare sizes, which is where the model is least reliable.

  Raises:
    FieldError: the cell allows no layout on these devices.
  """
  ranked = layouts(cell.config, topology)
  if not ranked:
    try:  # the error of its own mesh says why
      resolve_mesh(cell.config, topology.devices, topology.n_slices)
    except FieldError as error:
      raise error.under("config") from None
    raise FieldError("topology", topology.label, f"{cell.name} has no layout on its "
                     f"{topology.devices} devices")
  chosen, taken = [], collections.Counter()
  for layout in ranked:
    expert = layout.config.execution.mesh.expert
    if taken[expert] < max(1, tries // 2):
      taken[expert] += 1
      chosen.append(layout)
  chosen += [layout for layout in ranked if layout not in chosen]  # if there are too few sizes
  return [(layout, dataclasses.replace(cell, name=f"{cell.name} {layout.label}",
                                       config=layout.config)) for layout in chosen[:tries]]


def recommend(cells: Sequence[Cell], topology: Topology, tries: int,
              plan_cells: Callable[[list[Cell]], list[Plan]]) -> tuple[list[Plan], list[Plan], str]:
  """Returns (all plans, the best of each cell, verdicts); a cell's error becomes its plan."""
  tried, refused = {}, {}
  for cell in cells:
    try:
      tried[cell.name] = candidates(cell, topology, tries)
    except FieldError as error:
      refused[cell.name] = Plan(cell.name, cell.config, topology, {}, str(error))
  compiled = iter(plan_cells([variant for found in tried.values() for _, variant in found]))
  plans, chosen, verdicts = [], [], []
  for cell in cells:
    if cell.name in refused:
      plans.append(refused[cell.name])
      chosen.append(refused[cell.name])
      verdicts.append(f"{cell.name}: {refused[cell.name].error}")
      continue
    outcomes = [(layout, next(compiled)) for layout, _ in tried[cell.name]]
    plans += [plan for _, plan in outcomes]
    chosen.append(best(outcomes))
    verdicts.append(verdict(cell, outcomes))
  return plans, chosen, "\n".join(verdicts)


def best(tried: list[tuple[Layout, Plan]]) -> Plan:
  """Returns the fastest plan that fits, or the first if none does."""
  fitting = [plan for _, plan in tried if plan.fits]
  return min(fitting, key=lambda plan: plan.seconds) if fitting else tried[0][1]


def verdict(cell: Cell, tried: list[tuple[Layout, Plan]]) -> str:
  """Describes the recommendation and the runners-up, one line each."""
  fitting = sorted(((plan.seconds, layout) for layout, plan in tried if plan.fits),
                   key=lambda pair: pair[0])
  if not fitting:
    return f"{cell.name}: none of the {len(tried)} compiled layouts fits"
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
