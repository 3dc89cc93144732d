"""Downstream tasks: runs lm-evaluation-harness in this process, directly on a checkpoint."""
