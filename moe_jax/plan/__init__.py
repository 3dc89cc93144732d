"""What a cell costs on a TPU pod, told by XLA's own TPU compiler, without a TPU."""
