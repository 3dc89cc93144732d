"""From budgets to an architecture: by a fitted law, a published one, or all of them. No JAX."""
