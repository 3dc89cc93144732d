"""Peak figures of accelerators, looked up by name or by JAX device kind.

The figures are published by the vendors: Cloud TPU's system architecture pages and NVIDIA's
data sheets (SXM parts, dense bfloat16, no structured sparsity). TPU memory is in GiB, as on the
chips; NVIDIA's is taken as the decimal gigabytes of the data sheet, a few percent
below what the driver shows, so that plans are conservative. Link bandwidths are published as the
sum over all links of a chip and both directions; here they are for one direction, half of that.

A TPU's clock is its published peak divided by the FLOPs of its matrix units per cycle (v4 and v5p
have eight units of 128 x 128, v5e four, v6e four of 256 x 256, tpu7x eight). A chip's share of the
data center network is from "How To Scale Your Model" (jax-ml.github.io/scaling-book); for
v4 and tpu7x it is that of the nearest generation.

The TPU memory available to a program is what the compiler allows, not the published figure. It is
taken from libtpu 0.0.42.1's error message, "exceeds available HBM (15.75G)", for a program that is
too large, for each kind (tests/plan/limit_test.py checks it again).
"""

import dataclasses

_GIB = 2**30

# On-demand list prices in US regions, seen in 2026 in an undated catalog; `--usd_per_chip_hour`
# overrides them. None if there is no public price.
PRICES_AS_OF = "a 2026 catalogue snapshot"


@dataclasses.dataclass(frozen=True)
class Hardware:
  """One kind of accelerator chip.

  Attributes:
    name: short name, e.g. `v5p`.
    bf16_flops: peak dense bfloat16 FLOP/s of a chip.
    hbm_bytes: memory of a chip.
    hbm_bytes_per_second: peak memory bandwidth of a chip.
    link_bytes_per_second: bandwidth from a chip to others of its slice or NVLink domain, over
      all its links (ICI, NVLink), in one direction.
    device_kinds: values of `jax.Device.device_kind` for it.
    devices_per_chip: JAX devices per chip (two for tpu7x, whose cores are separate devices).
    clock_hz: of a TPU, to convert XLA's cycles to time; None for a GPU.
    dcn_bytes_per_second: a chip's share of the network between TPU slices; None for a GPU.
    usd_per_chip_hour: see PRICES_AS_OF.
    program_hbm_bytes: memory available to a program on one JAX device of a TPU; None for a GPU.
  """

  name: str
  bf16_flops: float
  hbm_bytes: float
  hbm_bytes_per_second: float
  link_bytes_per_second: float
  device_kinds: tuple[str, ...]
  devices_per_chip: int = 1
  clock_hz: float | None = None
  dcn_bytes_per_second: float | None = None
  usd_per_chip_hour: float | None = None
  program_hbm_bytes: float | None = None

  @property
  def device_bf16_flops(self) -> float:
    """Peak dense bfloat16 FLOP/s of one JAX device: the denominator of MFU."""
    return self.bf16_flops / self.devices_per_chip

  @property
  def device_hbm_bytes_per_second(self) -> float:
    """Peak memory bandwidth of one JAX device."""
    return self.hbm_bytes_per_second / self.devices_per_chip

  @property
  def device_dcn_bytes_per_second(self) -> float:
    """One JAX device's share of the network between TPU slices."""
    return self.dcn_bytes_per_second / self.devices_per_chip


HARDWARE = {chip.name: chip for chip in (
    Hardware("v4", 275e12, 32 * _GIB, 1200e9, 270e9, ("TPU v4",), clock_hz=1.05e9,
             dcn_bytes_per_second=6.25e9, usd_per_chip_hour=3.22,
             program_hbm_bytes=30.75 * _GIB),
    Hardware("v5e", 197e12, 16 * _GIB, 820e9, 200e9, ("TPU v5 lite", "TPU v5e"), clock_hz=1.5e9,
             dcn_bytes_per_second=3.125e9, usd_per_chip_hour=1.20,
             program_hbm_bytes=15.75 * _GIB),
    Hardware("v5p", 459e12, 95 * _GIB, 2765e9, 600e9, ("TPU v5", "TPU v5p"), clock_hz=1.75e9,
             dcn_bytes_per_second=6.25e9, usd_per_chip_hour=4.20,
             program_hbm_bytes=95.74 * _GIB),
    Hardware("v6e", 918e12, 32 * _GIB, 1640e9, 400e9, ("TPU v6 lite", "TPU v6e"),
             clock_hz=1.75e9, dcn_bytes_per_second=12.5e9, usd_per_chip_hour=2.70,
             program_hbm_bytes=31.25 * _GIB),
    Hardware("tpu7x", 2307e12, 192 * _GIB, 7400e9, 600e9, ("TPU7x",), devices_per_chip=2,
             clock_hz=2.2e9, dcn_bytes_per_second=12.5e9, program_hbm_bytes=94.75 * _GIB),
    Hardware("a100-80", 312e12, 80e9, 2040e9, 300e9, ("NVIDIA A100-SXM4-80GB",)),
    Hardware("h100", 989e12, 80e9, 3350e9, 450e9, ("NVIDIA H100 80GB HBM3",)),
    Hardware("h200", 989e12, 141e9, 4800e9, 450e9, ("NVIDIA H200",)),
    Hardware("b200", 2250e12, 180e9, 8000e9, 900e9, ("NVIDIA B200",)),
)}

_BY_KIND = {kind: chip for chip in HARDWARE.values() for kind in chip.device_kinds}


def by_device_kind(kind: str) -> Hardware | None:
  """The accelerator that `jax.Device.device_kind` names, or None if it is not in the table.

  The match is exact: the PCIe variants of a GPU have other peaks, and it is better to report no
  MFU than one relative to the wrong peak.
  """
  return _BY_KIND.get(kind)
