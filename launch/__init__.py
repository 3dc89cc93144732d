"""Launches the cells of a grid and reports their state. Imports no JAX, so commands start fast."""
