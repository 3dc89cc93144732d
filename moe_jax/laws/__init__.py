"""Published scaling laws and fits to one's own runs: NumPy only, no JAX; scipy imported lazily."""
