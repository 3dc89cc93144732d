"""Evaluation: offline, from the checkpoints of finished runs."""
