"""What tests of lowering for a GPU need where there is none."""


def pretend_h100(monkeypatch) -> None:
  """JAX 0.10 takes a GPU of Hopper's kind for granted; 0.11 wants to know which one it is."""
  try:
    from jax._src.pallas.triton import gpu_info
  except ImportError:
    return
  monkeypatch.setitem(gpu_info.registry, "cpu", lambda: gpu_info.get_gpu_info_from_version(
      gpu_info.GpuVersion.H100))
