"""Times every attention implementation available on this device, forward and with gradients.

    python -m benchmarks.attention --attention_rows=8 --attention_seq_len=2048 --attention_heads=8 \
        --attention_width=128

`plain` is the peer, JAX's own attention, which materializes all scores; `ours` is what a training
step uses. A GPU adds cuDNN's kernel, causal only and with a document mask, and JAX's Pallas kernel
for several tile sizes of its backward pass. The limit is one square product in bfloat16, timed in
the same passes: the last column is the speed with gradients, counting causal FLOPs only, as a share
of it. `error` is the largest relative error (norm of the difference over norm) of output and
gradients against float32. For an implementation that fails, the table gives the error. Passes are
interleaved, and the fastest of each counts. Prints a table, then the same figures as JSON.
"""

import functools
import json
import os
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks.iso_solver import machine
from benchmarks.timing import fastest
from moe_jax import cli
from moe_jax.design.sheet import Sheet, print_sheet
from moe_jax.memory import use_huge_pages
from moe_jax.mesh import MESH_AXES, platform_of
from moe_jax.model import flash
from moe_jax.model.attend import attend, plain_attention

_ROWS, _SEQ_LEN, _HEADS, _WIDTH = (
    flags.DEFINE_integer(f"attention_{name}", value, f"{what}.", lower_bound=1)
    for name, value, what in (("rows", 16, "Sequences"), ("seq_len", 256, "Tokens in each"),
                              ("heads", 4, "Heads"), ("width", 64, "Width of a head")))
_PASSES = flags.DEFINE_integer("attention_passes", 10, "Number of passes; the fastest counts.",
                               lower_bound=1)
_TILES = ((32, 32), (64, 32), (32, 64), (64, 64), (128, 64))
WITHOUT_DOCUMENTS = "cuDNN, without documents"
_SIDE = {"cpu": 2048}  # of the square product; 8192 on other platforms

Attention = Callable[..., jax.Array]  # query_BSHh, key_BSHh, value_BSHh, segments_BS -> out_BSHh


def ways(mesh: jax.sharding.Mesh) -> dict[str, Attention]:
  """Implementations that may run on the mesh's device, by name."""
  found = {"plain": functools.partial(plain_attention, mesh=mesh),
           "ours": functools.partial(attend, mesh=mesh)}
  if platform_of(mesh) != "gpu":
    return found
  found[WITHOUT_DOCUMENTS] = lambda query, key, value, _: _cudnn(query, key, value)
  found["cuDNN, documents as a mask"] = lambda query, key, value, segments_BS: _cudnn(
      query, key, value, mask=(segments_BS[:, :, None] == segments_BS[:, None, :])[:, None])
  for tile in _TILES if flash.kernel() else ():
    found["Pallas, {} x {}".format(*tile)] = functools.partial(_pallas, tile)
  return found


_cudnn = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")


def _pallas(tile, query_BSHh, key_BSHh, value_BSHh, segments_BS):
  queries, keys = tile
  sizes = flash.kernel().BlockSizes(128, 128, queries, keys, keys, queries)
  return flash.kernel().mha(query_BSHh, key_BSHh, value_BSHh, segments_BS, causal=True,
                            sm_scale=query_BSHh.shape[3]**-0.5, block_sizes=sizes)


def inputs(rows: int, seq_len: int, heads: int, width: int) -> list[jax.Array]:
  """Returns queries, keys, values, segments_BS of three documents, and the output gradient."""
  *keys, last = jax.random.split(jax.random.key(0), 5)
  arrays = [jax.random.normal(key, (rows, seq_len, heads, width), jnp.bfloat16) for key in keys]
  segments_BS = jnp.sort(jax.random.randint(last, (rows, seq_len), 0, 3), axis=1)
  return [*arrays[:3], segments_BS, arrays[3]]


def with_gradients(way: Attention) -> Callable[..., tuple[jax.Array, ...]]:
  """Returns a function that computes the output and the gradients of queries, keys and values."""

  def run(query, key, value, segments, dout):
    out, back = jax.vjp(lambda *arrays: way(*arrays, segments), query, key, value)
    return out, *back(dout)

  return run


def largest_error(found: tuple[jax.Array, ...], exact: tuple[jax.Array, ...]) -> float:
  """Largest relative error of any array: norm of the difference over norm of the exact array."""
  return max(float(np.linalg.norm(np.float32(x) - np.float32(y)) / np.linalg.norm(np.float32(y)))
             for x, y in zip(found, exact, strict=True))


def compiled(way: Attention, arrays: list[jax.Array], exact: tuple[jax.Array, ...]
             ) -> tuple[dict[str, Callable], dict[str, float]]:
  """Compiles one implementation: (programs bound to their inputs, error and memory)."""
  forward = jax.jit(way).lower(*arrays[:4]).compile()
  both = jax.jit(with_gradients(way)).lower(*arrays).compile()
  return ({"forward": functools.partial(forward, *arrays[:4]),
           "gradients": functools.partial(both, *arrays)},
          {"error": largest_error(both(*arrays), exact),
           "temporary_mb": both.memory_analysis().temp_size_in_bytes / 1e6})


def main(overrides: list[str]) -> None:
  cli.no_overrides(overrides)
  device = jax.devices()[0]
  mesh = jax.make_mesh((1, 1, 1), MESH_AXES, devices=[device],
                       axis_types=(jax.sharding.AxisType.Auto,) * 3)
  rows, seq_len, heads, width = (flag.value for flag in (_ROWS, _SEQ_LEN, _HEADS, _WIDTH))
  arrays = inputs(rows, seq_len, heads, width)
  exactly = jax.jit(with_gradients(functools.partial(plain_attention, mesh=mesh)))
  in_float32 = [x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x for x in arrays]
  with_documents = exactly(*in_float32)
  without = exactly(*in_float32[:3], None, in_float32[4])
  side = _SIDE.get(device.platform, 8192)
  square = jax.random.normal(jax.random.key(1), (side, side), jnp.bfloat16)
  programs = {("limit", "forward"): functools.partial(
      jax.jit(lambda x, y: jnp.dot(x, y, preferred_element_type=jnp.float32).astype(x.dtype)),
      square, square)}
  figures: dict[str, dict] = {}
  for name, way in ways(mesh).items():
    try:
      made, figures[name] = compiled(way, arrays,
                                     without if name == WITHOUT_DOCUMENTS else with_documents)
    except Exception as refused:  # whatever error a library raises goes into its row
      figures[name] = {"refused": (str(refused).strip() or repr(refused)).splitlines()[0][:100]}
      continue
    programs |= {(name, which): program for which, program in made.items()}
  seconds = fastest(programs, _PASSES.value)
  peak = 2 * side**3 / seconds["limit", "forward"]
  # Two score-sized products forward and five backward; causal, so half of the scores count.
  flops = (2 + 5) * rows * heads * seq_len**2 * width
  sheet = Sheet(f"attention, {rows} x {seq_len} tokens, {heads} heads of {width}, bfloat16, "
                f"{device.device_kind}; a square product reaches {peak / 1e12:.3g} TFLOP/s",
                ["way"], ["forward [ms]", "with gradients [ms]", "temporary [MB]", "error",
                          "of the product's speed"])
  for name, found in figures.items():
    if "refused" in found:
      sheet.add(f"{name}: {found['refused']}", *[""] * 5)
      continue
    forward, both = (seconds[name, which] for which in ("forward", "gradients"))
    found |= {"forward_ms": 1e3 * forward, "gradients_ms": 1e3 * both,
              "of_the_product": flops / both / peak}
    sheet.add(name, f"{1e3 * forward:.3f}", f"{1e3 * both:.3f}", f"{found['temporary_mb']:.0f}",
              f"{found['error']:.1e}", f"{found['of_the_product']:.0%}")
  print_sheet(sheet)
  print(json.dumps({"machine": machine(), "device": device.device_kind, "jax": jax.__version__,
                    "load_average": os.getloadavg(), "product_flops": peak,
                    "rows": rows, "seq_len": seq_len, "heads": heads, "width": width,
                    "ways": figures}, indent=2))


if __name__ == "__main__":
  use_huge_pages()
  cli.run(main)
