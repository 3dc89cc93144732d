"""Checks that the GPU kernels compute correct results on this device, before anything is timed.

    python -m benchmarks.kernels                        # on a GPU
    python -m benchmarks.kernels --kernels_interpret    # anywhere: the same programs, interpreted

Covers grouped matrix products and attention within documents, in bfloat16, outputs and gradients,
alone and under vmap as in a population. Prints the largest relative error (norm of the difference
over norm) of any array against float64 (groups) or float32 (attention). Up to about 3e-3 is
rounding; the exit code is 1 if any error reaches MOST.
"""

import functools
import json
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks.attention import largest_error, with_gradients
from benchmarks.iso_solver import machine
from moe_jax import cli
from moe_jax.mesh import MESH_AXES
from moe_jax.model import flash
from moe_jax.model.attend import plain_attention
from moe_jax.moe import grouped_triton as triton
from moe_jax.moe.grouped_matmul import SPARE_ROWS, blocks_of
from moe_jax.text import aligned

_INTERPRET = flags.DEFINE_bool("kernels_interpret", False, "Interprets the kernels, without a GPU.")

MOST = 1e-2
SIZES = (130, 0, 257, 1, 40)  # over one block, none, over two blocks, one row, part of one
MATRICES = ((100, 72), (156, 148), (80, 84))  # with the study's widths
WIDTHS = (40, 72, 96, 128)  # of heads
_SEQ_LEN = 256


def groups(d: int, f: int, seed: int) -> tuple[jax.Array, ...]:
  """Returns x_SD, w_EDF, dy_SF, size_E; rows outside every group are zero."""
  rng, n_rows = np.random.default_rng(seed), sum(SIZES) + SPARE_ROWS
  inside_S = np.arange(n_rows)[:, None] < sum(SIZES)
  arrays = (inside_S * rng.normal(size=(n_rows, d)), rng.normal(size=(len(SIZES), d, f)),
            inside_S * rng.normal(size=(n_rows, f)))
  return *(jnp.asarray(x, jnp.bfloat16) for x in arrays), jnp.asarray(SIZES, jnp.int32)


def of_groups(x_SD, w_EDF, dy_SF, size_E, *, interpret: bool) -> tuple[jax.Array, ...]:
  """Returns the products, and the gradients of rows and matrices."""
  blocks = blocks_of(len(x_SD), size_E, triton.ROWS)
  where = blocks.expert_J, blocks.start_J, blocks.inside_J
  return (triton.multiply_rows(x_SD, w_EDF, *where, interpret=interpret),
          triton.multiply_rows(dy_SF, w_EDF.swapaxes(1, 2), *where, interpret=interpret),
          triton.sum_of_outer_products(x_SD, dy_SF, size_E, interpret=interpret))


def of_groups_exactly(x_SD, w_EDF, dy_SF, size_E) -> tuple[np.ndarray, ...]:
  x_SD, w_EDF, dy_SF = (np.float64(x) for x in (x_SD, w_EDF, dy_SF))
  found = np.zeros_like(dy_SF), np.zeros_like(x_SD), np.zeros_like(w_EDF)
  for e, end in enumerate(np.cumsum(size_E)):
    rows = slice(end - size_E[e], end)
    found[0][rows], found[1][rows] = x_SD[rows] @ w_EDF[e], dy_SF[rows] @ w_EDF[e].T
    found[2][e] = x_SD[rows].T @ dy_SF[rows]
  return found


def attention(width: int, seed: int) -> tuple[jax.Array, ...]:
  """Returns queries, keys, values, segments_BS (three documents) and dout_BSHh of two sequences."""
  *keys, last = jax.random.split(jax.random.key(seed), 5)
  query, key, value, dout = (jax.random.normal(key, (2, _SEQ_LEN, 2, width), jnp.bfloat16)
                             for key in keys)
  segments_BS = jnp.sort(jax.random.randint(last, (2, _SEQ_LEN), 0, 3), axis=1)
  return query, key, value, segments_BS, dout


def cases(interpret: bool, matrices: Sequence[tuple[int, int]] = MATRICES,
          widths: Sequence[int] = WIDTHS) -> Iterator[tuple[str, Callable, Callable, list]]:
  """Yields (name, kernel, exact reference, the arguments of each of two members)."""
  mesh = jax.make_mesh((1, 1, 1), MESH_AXES, devices=jax.devices()[:1],
                       axis_types=(jax.sharding.AxisType.Auto,) * 3)
  for d, f in matrices:
    yield (f"groups, [{d}, {f}]", functools.partial(of_groups, interpret=interpret),
           of_groups_exactly, [groups(d, f, seed) for seed in range(2)])
  ours = with_gradients(functools.partial(flash.flash_attention, mesh=mesh, interpret=interpret))
  plain = jax.jit(with_gradients(functools.partial(plain_attention, mesh=mesh)))

  def exactly(*arrays):
    return plain(*(x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x for x in arrays))

  for width in widths:
    yield f"attention, heads of {width}", ours, exactly, [attention(width, s) for s in range(2)]


def errors(ours: Callable, exactly: Callable, members: list) -> dict[str, float]:
  """Largest error of the members run alone, and of both under vmap."""
  exact = [exactly(*member) for member in members]
  alone = jax.jit(ours)
  together = jax.jit(jax.vmap(ours))(*(jnp.stack(each) for each in zip(*members, strict=True)))
  return {"alone": max(largest_error(alone(*member), truth)
                       for member, truth in zip(members, exact, strict=True)),
          "population": max(largest_error(tuple(x[i] for x in together), truth)
                            for i, truth in enumerate(exact))}


def main(overrides: list[str]) -> int:
  cli.no_overrides(overrides)
  found = {name: errors(*case) for name, *case in cases(_INTERPRET.value)}
  print("\n".join(aligned([("kernel", "alone", "population"), *(
      (name, *(f"{value:.1e}" for value in each.values())) for name, each in found.items())])))
  wrong = [name for name, each in found.items() if not max(each.values()) < MOST]
  print(f"{len(found) - len(wrong)} of {len(found)} are correct"
        + (f"; WRONG: {', '.join(wrong)}" if wrong else ""))
  print(json.dumps({"machine": machine(), "device": jax.devices()[0].device_kind,
                    "jax": jax.__version__, "interpreted": _INTERPRET.value, "errors": found},
                   indent=2))
  return int(bool(wrong))


if __name__ == "__main__":
  cli.run(main)
