"""Downstream tasks: lm-evaluation-harness in this process, straight from a checkpoint."""
