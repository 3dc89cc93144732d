"""Where a mesh puts its devices on a torus."""

import itertools
import types

import numpy as np
import pytest

from moe_jax import mesh as mesh_lib
from moe_jax.config import MeshConfig
from moe_jax.mesh import torus_order
from tests.experiment_files import run_module
from tests.plan import libtpu
from tests.small import small_config


def places(*extents: int) -> list[tuple[int, ...]]:
  return list(itertools.product(*map(range, extents)))


@pytest.mark.parametrize("extents, sizes, block", [
    ((1, 2, 4, 4, 1), (1, 4, 8), (2, 2, 2, 1)),
    ((1, 4, 4, 4, 1), (2, 2, 16), (4, 2, 2, 1)),
    ((1, 4, 4, 1, 1), (1, 2, 8), (4, 2, 1, 1)),
    ((1, 2, 2, 1, 2), (1, 2, 4), (2, 2, 1, 1)),  # two devices a chip
    ((2, 2, 4, 1, 1), (4, 1, 4), (2, 2, 1, 1)),  # two slices
])
def test_experts_lie_in_a_block_as_near_a_cube_as_there_is(extents, sizes, block):
  where = np.array(places(*extents))
  shuffled = np.random.default_rng(0).permutation(len(where))
  order = torus_order([tuple(place) for place in where[shuffled]], *sizes)
  assert order.shape == sizes and sorted(order.ravel()) == list(range(len(where)))
  of_group = where[shuffled][order]
  spans = np.ptp(of_group, axis=2) + 1
  assert {tuple(sorted(span)) for span in spans.reshape(-1, 5)} == {tuple(sorted((1, *block)))}
  slices = of_group[..., 0]
  assert (slices == slices[:, :1, :1]).all()  # only `data` crosses
  assert (np.diff(slices[:, 0, 0]) >= 0).all()


def test_what_does_not_divide_the_torus_is_left_to_jax():
  assert torus_order(places(1, 2, 4, 1), 1, 1, 3) is None
  assert torus_order(places(1, 2, 4, 1)[:-1], 1, 1, 7) is None
  assert torus_order(places(2, 2, 2, 1), 1, 1, 8) is None  # experts would cross slices


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_only_a_tpus_coordinates_are_places_on_a_torus(monkeypatch, platform):
  """A GPU may have coordinates too: of its host and its place there, which no torus joins."""
  devices = [types.SimpleNamespace(platform=platform, coords=place) for place in places(2, 4, 1)]
  monkeypatch.setattr(mesh_lib, "Mesh", lambda placed, *_, **__: placed)
  monkeypatch.setattr(mesh_lib.mesh_utils, "create_device_mesh", lambda *_, **__: "as JAX does")
  config = small_config(execution={"mesh": MeshConfig(2, 1, 4)})
  made = mesh_lib.make_mesh(config, devices)
  if platform == "gpu":
    assert made == "as JAX does"
  else:
    assert [sorted(device.coords[:2] for device in group) for group in made[:, 0]] == [
        [(0, 0), (0, 1), (1, 0), (1, 1)], [(0, 2), (0, 3), (1, 2), (1, 3)]]


_EVERY_MESH = """
import dataclasses, os
from moe_jax.plan import topology, worker
os.environ.update(worker.ENVIRONMENT)
from moe_jax.config import MeshConfig
from moe_jax.mesh import make_mesh
from tests.small import ARCH, small_config

arch = dataclasses.replace(ARCH, n_exp=64, d_model=64, d_expert=64)
for name in ("v4-16", "v5litepod-16", "v5p-64", "v6e-16"):
  devices = worker.tpu_devices(topology.parse(name))
  sizes = [2**i for i in range(6) if 2**i <= len(devices)]
  for fsdp, expert in [(f, e) for f in sizes for e in sizes if f * e <= len(devices)]:
    config = small_config(arch, train={"batch_size": 64},
                          execution={"mesh": MeshConfig(fsdp=fsdp, expert=expert)})
    made = make_mesh(config, devices)
    assert made.devices.shape == (len(devices) // (fsdp * expert), fsdp, expert)
    assert sorted(device.id for device in made.devices.flat) == sorted(d.id for d in devices)
print("all")
"""


@pytest.mark.slow
def test_every_mesh_has_its_place_on_every_torus():
  """Eight chips of 4 x 4 need a part of one of its axes, which JAX must be asked for."""
  done = run_module("-c", _EVERY_MESH, timeout=300, **libtpu.environment())
  assert done.returncode == 0 and done.stdout == "all\n", done.stderr
