"""What a launcher must know of a TPU slice beside its topology: VMs, runtime, GKE's names."""

import dataclasses
import math
import re

from launch import money
from moe_jax.errors import FieldError, require
from moe_jax.plan import topology as topology_lib
from moe_jax.plan.topology import Topology

# Cloud TPU's "TPU software versions" page.
RUNTIMES = {"v4": "tpu-ubuntu2204-base", "v5e": "v2-alpha-tpuv5-lite", "v5p": "v2-alpha-tpuv5",
            "v6e": "v2-alpha-tpuv6e"}
# GKE's "Plan TPUs in GKE" page: values of cloud.google.com/gke-tpu-accelerator.
GKE_ACCELERATORS = {"v4": "tpu-v4-podslice", "v5e": "tpu-v5-lite-podslice",
                    "v5p": "tpu-v5p-slice", "v6e": "tpu-v6e-slice", "tpu7x": "tpu7x"}


@dataclasses.dataclass(frozen=True)
class Slice:
  """One slice and its hosts.

  Attributes:
    topology: its chips.
    chips_per_vm: of each host; all hosts of a slice are equal.
  """

  topology: Topology
  chips_per_vm: int

  @property
  def vms(self) -> int:
    """Hosts of one slice."""
    return math.prod(self.topology.shape) // self.chips_per_vm

  @property
  def gke_topology(self) -> str:
    """`4x4x4`, as the label cloud.google.com/gke-tpu-topology has it."""
    return "x".join(map(str, self.topology.shape))


class OnSlices:
  """What follows from the options `topology`, `slices_per_run` and `usd_per_chip_hour`."""

  @property
  def slice(self) -> Slice:
    """Each of a run's slices."""
    return parse_slice(self.topology, self.slices_per_run)

  @property
  def hosts(self) -> int:
    """Machines of each run."""
    return self.slice.vms * self.slices_per_run

  @property
  def run_devices(self) -> int:
    """JAX devices of each run."""
    return self.slice.topology.devices

  @property
  def usd_per_second(self) -> float:
    """Of each run's machines; 0 where it is not known."""
    return money.usd_per_second(self.slice.topology, self.usd_per_chip_hour) or 0.0


def parse_slice(name: str, slices_per_run: int) -> Slice:
  """`v6e-16` -> its Slice. v5e and v6e have one VM up to 8 chips, else 4 chips a VM; the
  others always 4.

  Raises:
    FieldError: no such slice, or fewer than one slice a run.
  """
  require(slices_per_run >= 1, "slices_per_run", slices_per_run, "must be at least 1")
  topology = topology_lib.parse(name, slices_per_run)
  chips = math.prod(topology.shape)
  flat = len(topology.shape) == 2
  return Slice(topology, chips if flat and chips <= 8 else 4)


def require_zone(zone: str) -> None:
  """Raises FieldError unless it looks like `us-east5-b`."""
  if not re.fullmatch(r"[a-z]+-[a-z]+[0-9]{1,2}-[a-z]", zone):
    raise FieldError("zones", zone, "must be zones such as us-east5-b, separated by commas")
