"""Experimental design for grids: what a grid can detect, and which runs to add to it. No JAX."""
