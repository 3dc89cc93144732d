"""A grid as an experiment: what it can detect, and which runs to add to it. No JAX."""
