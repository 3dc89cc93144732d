"""TPU slice facts that launchers need beyond the topology: VMs, runtimes, GKE's names."""

import dataclasses
import math
import re

from launch import money
from moe_jax.errors import FieldError, require
from moe_jax.plan import topology as topology_lib
from moe_jax.plan.topology import Topology

# From Cloud TPU's "TPU software versions" page.
RUNTIMES = {"v4": "tpu-ubuntu2204-base", "v5e": "v2-alpha-tpuv5-lite", "v5p": "v2-alpha-tpuv5",
            "v6e": "v2-alpha-tpuv6e"}
# From GKE's "Plan TPUs in GKE" page: values of cloud.google.com/gke-tpu-accelerator.
GKE_ACCELERATORS = {"v4": "tpu-v4-podslice", "v5e": "tpu-v5-lite-podslice",
                    "v5p": "tpu-v5p-slice", "v6e": "tpu-v6e-slice", "tpu7x": "tpu7x"}


@dataclasses.dataclass(frozen=True)
class Slice:
  """One slice and its hosts.

  Attributes:
    topology: its chips.
    chips_per_vm: chips of each host, the same for all hosts of a slice.
  """

  topology: Topology
  chips_per_vm: int

  @property
  def vms(self) -> int:
    """Number of hosts of one slice."""
    return math.prod(self.topology.shape) // self.chips_per_vm

  @property
  def gke_topology(self) -> str:
    """Value of the label cloud.google.com/gke-tpu-topology, e.g. `4x4x4`."""
    return "x".join(map(str, self.topology.shape))


class OnSlices:
  """Properties derived from the options `topology`, `slices_per_run` and `usd_per_chip_hour`."""

  @property
  def slice(self) -> Slice:
    """One of a run's slices, which are all alike."""
    return parse_slice(self.topology, self.slices_per_run)

  @property
  def hosts(self) -> int:
    """Number of machines of each run."""
    return self.slice.vms * self.slices_per_run

  @property
  def run_devices(self) -> int:
    """Number of JAX devices of each run."""
    return self.slice.topology.devices

  @property
  def usd_per_second(self) -> float:
    """US dollars per second of each run's machines; 0 if unknown."""
    return money.usd_per_second(self.slice.topology, self.usd_per_chip_hour) or 0.0


def parse_slice(name: str, slices_per_run: int) -> Slice:
  """Parses a slice name such as `v6e-16`.

  v5e and v6e slices of up to 8 chips are one VM; all others have 4 chips per VM.

  Raises:
    FieldError: there is no such slice, or a run has fewer than one slice.
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
