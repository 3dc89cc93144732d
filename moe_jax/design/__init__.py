"""Chooses an architecture for given budgets by a fitted law or published laws. No JAX."""
