"""Starts the cells of a grid and says how they stand. No JAX: it answers at once."""
