"""The shape of a model, its exact counts, and the iso-N_total solver. Arithmetic only, no JAX."""

from moe_jax.arch import count, hardware
from moe_jax.arch.architecture import Architecture
from moe_jax.arch.hardware import HARDWARE, Hardware, by_device_kind
from moe_jax.arch.iso import (
    IsoGrid,
    IsoLimits,
    IsoRefused,
    IsoSolution,
    solve,
    solve_grid,
)

__all__ = [
    "HARDWARE", "Architecture", "Hardware", "IsoGrid", "IsoLimits", "IsoRefused",
    "IsoSolution", "by_device_kind", "count", "hardware", "solve", "solve_grid",
]
