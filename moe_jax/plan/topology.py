"""TPU slices by the names that gcloud uses: number of chips, shape and wraparound links.

No JAX here, so that names are checked before the slow imports. `worker.py` gets the devices from
libtpu.
"""

import dataclasses
import difflib
import math

from moe_jax.arch.hardware import HARDWARE, Hardware
from moe_jax.errors import FieldError, require

# Slice shapes by number of chips, from Cloud TPU's documentation: v4, v5p and tpu7x are
# three-dimensional tori, v5e and v6e two-dimensional. For some sizes, other shapes exist, too.
_SHAPES_2D = {1: (1, 1), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8),
              128: (8, 16), 256: (16, 16)}
_SHAPES_3D = {4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4), 64: (4, 4, 4),
              128: (4, 4, 8), 256: (4, 8, 8), 512: (8, 8, 8), 1024: (8, 8, 16),
              2048: (8, 16, 16), 4096: (16, 16, 16), 6144: (16, 16, 24)}


@dataclasses.dataclass(frozen=True)
class _Family:
  """The slices of one TPU generation, named `prefix-N` with N = chips * units_per_chip."""

  hardware: str
  units_per_chip: int
  shapes: dict[int, tuple[int, ...]]
  max_chips: int


_FAMILIES = {
    "v4": _Family("v4", 2, _SHAPES_3D, 2048),
    "v5litepod": _Family("v5e", 1, _SHAPES_2D, 256),
    "v5p": _Family("v5p", 2, _SHAPES_3D, 6144),
    "v6e": _Family("v6e", 1, _SHAPES_2D, 256),
    "tpu7x": _Family("tpu7x", 2, _SHAPES_3D, 4096),
}


@dataclasses.dataclass(frozen=True)
class Topology:
  """One slice, or several equal ones.

  Attributes:
    name: gcloud's name of one slice, e.g. `v5p-64`.
    hardware: the chip.
    shape: chips of one slice along each dimension of its torus.
    n_slices: number of slices, joined by the data-center network.
  """

  name: str
  hardware: Hardware
  shape: tuple[int, ...]
  n_slices: int = 1

  @property
  def chips(self) -> int:
    """Chips of all slices."""
    return math.prod(self.shape) * self.n_slices

  @property
  def devices(self) -> int:
    """JAX devices of all slices."""
    return self.chips * self.hardware.devices_per_chip

  @property
  def label(self) -> str:
    return f"{self.name}x{self.n_slices}" if self.n_slices > 1 else self.name

  def wraps(self, dimension: int) -> bool:
    """Whether the torus wraps around along a dimension.

    v4, v5p and tpu7x wrap on slices made of whole cubes of 4 x 4 x 4 chips; v5e and v6e only along
    a dimension with the pod's full 16 chips. (Cloud TPU's system architecture pages.)
    """
    if len(self.shape) == 2:
      return self.shape[dimension] == 16
    return all(extent % 4 == 0 for extent in self.shape)


def names() -> tuple[str, ...]:
  """Names of all known slices."""
  return tuple(f"{prefix}-{chips * family.units_per_chip}"
               for prefix, family in _FAMILIES.items()
               for chips in family.shapes if chips <= family.max_chips)


def parse(name: str, n_slices: int = 1) -> Topology:
  """Parses a slice name such as `v5p-64`.

  As in gcloud, the number counts TensorCores for v4, v5p and tpu7x (two per chip), and chips for
  v5litepod and v6e.

  Raises:
    FieldError: no such slice in the table (the error names the nearest), or `n_slices` < 1.
  """
  require(n_slices >= 1, "slices", n_slices, "must be at least 1")
  prefix, _, number = name.rpartition("-")
  family = _FAMILIES.get(prefix)
  if family is not None and number.isascii() and number.isdigit():
    require(not number.startswith("0"), "topology", name, "must be a gcloud name, whose "
            "number does not begin with zero")
    chips, rest = divmod(int(number), family.units_per_chip)
    if not rest and chips in family.shapes and chips <= family.max_chips:
      return Topology(name, HARDWARE[family.hardware], family.shapes[chips], n_slices)
    sizes = [chips * family.units_per_chip for chips in family.shapes
             if chips <= family.max_chips]
    below = [size for size in sizes if size < int(number)][-1:]
    above = [size for size in sizes if size > int(number)][:1]
    raise FieldError("topology", name, "not in the table of slices; the nearest are "
                     + " and ".join(f"{prefix}-{size}" for size in below + above))
  lower = name.lower()
  if lower.startswith("v5e-"):  # the name of the chip but not of its slices
    lower = lower.replace("v5e", "v5litepod")
  near = difflib.get_close_matches(lower, names(), n=2, cutoff=0.7)
  near = [lower] if lower in near else near
  known = "v4-N, v5litepod-N, v5p-N, v6e-N and tpu7x-N, e.g. v5p-64"
  raise FieldError("topology", name, "no such slice; " + (
      f"did you mean {' or '.join(near)}?" if near else f"there are {known}"))
