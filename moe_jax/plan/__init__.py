"""Estimates what a cell costs on a TPU pod with XLA's own TPU compiler, without a TPU."""
