"""Training: optimizer, training step, loop, checkpoints and metrics."""
