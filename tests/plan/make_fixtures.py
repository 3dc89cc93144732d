"""Compiles the small modules in fixtures/ with libtpu.

    python -m tests.plan.make_fixtures

Needed again only if the HLO's format changes; the tests read what is kept.
"""

import functools
import gzip
import os
import pathlib

from moe_jax.plan import topology, worker
from tests.plan.executed import STEPS

FOLDER = pathlib.Path(__file__).parent / "fixtures"


def scan_and_collectives():
  """Three layers of a product, an all-to-all and a gather over eight chips."""
  import jax
  import jax.numpy as jnp
  from jax.sharding import AxisType, NamedSharding
  from jax.sharding import PartitionSpec as P

  mesh = jax.make_mesh((2, 4), ("data", "expert"), axis_types=(AxisType.Auto,) * 2,
                       devices=worker.tpu_devices(topology.parse("v5litepod-8")))

  def layer(x_TD, w_DD):
    def on_device(x_tD):
      groups = x_tD.reshape(4, -1, x_tD.shape[-1])
      return jax.lax.all_to_all(groups, "expert", 0, 0).reshape(x_tD.shape)

    y_TD = jax.shard_map(on_device, mesh=mesh, in_specs=P(("data", "expert")),
                         out_specs=P(("data", "expert")))(x_TD @ w_DD)
    return y_TD, None

  def f(x_TD, w_LDD, index_T):
    y_TD, _ = jax.lax.scan(layer, x_TD, w_LDD)
    return y_TD[index_T], y_TD.sum()

  def array(shape, dtype, *spec):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))

  return jax.jit(f).lower(
      array((4096, 512), jnp.bfloat16, ("data", "expert")),
      array((3, 512, 512), jnp.bfloat16),
      array((4096,), jnp.int32, ("data", "expert"))).compile().as_text()


def whole_step(name: str) -> str:
  """A training step of `executed.STEPS`."""
  from moe_jax.mesh import make_mesh
  from moe_jax.train.step import lower_train_step
  config = STEPS[name]
  mesh = make_mesh(config, worker.tpu_devices(topology.parse("v5litepod-8")))
  return lower_train_step(config, mesh).compile().as_text()


def main() -> None:
  FOLDER.mkdir(exist_ok=True)
  made = {"scan": scan_and_collectives} | {
      name: functools.partial(whole_step, name) for name in STEPS}
  for name, make in made.items():
    with gzip.GzipFile(FOLDER / f"{name}.v5litepod-8.hlo.gz", "wb", mtime=0) as file:
      file.write(make().encode())


if __name__ == "__main__":
  os.environ.update(worker.ENVIRONMENT)
  main()
