"""Numbers only: the shape of a model, its exact counts, and the iso-N_total solver. No JAX."""

from moe_jax.arch.architecture import Architecture

__all__ = ["Architecture"]
