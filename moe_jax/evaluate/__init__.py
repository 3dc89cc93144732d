"""Offline evaluation of finished runs, from their checkpoints."""
