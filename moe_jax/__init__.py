"""MoE language models of equal size: train a grid, evaluate it, and choose a shape."""
