"""Trained-looking runs on disk: real checkpoints of initial parameters, a real small corpus."""

import dataclasses
import pathlib

import jax
import pytest

from moe_jax import run_dir as run_dir_lib
from moe_jax.data import corpus
from moe_jax.data.prepare import prepare
from moe_jax.grid import Cell, Grid
from moe_jax.mesh import make_mesh
from moe_jax.run_dir import RunDir
from moe_jax.train.checkpoint import Checkpointer
from moe_jax.train.step import init_state
from tests.data.conftest import folder_corpus, write_documents
from tests.small import ARCH, small_config

STATUS = {"step": 4, "steps": 4, "commit": "abc", "device_kind": "cpu", "n_devices": 1,
          "tokens_per_second": 1000.0, "mfu": 0.1, "error": None}


@pytest.fixture(scope="session")
def small_corpus(tmp_path_factory):
  """The corpus `small`, known for the whole session."""
  folder = tmp_path_factory.mktemp("texts")
  write_documents(folder)
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(corpus.CORPORA, "small", dataclasses.replace(
        folder_corpus(folder), name="small"))
    yield folder


@pytest.fixture(scope="session")
def out_with_data(small_corpus, tmp_path_factory):
  """A directory of experiments whose data are prepared."""
  out = tmp_path_factory.mktemp("out")
  prepare(small_config(data={"corpus": "small"}).data, out / "_data")
  return out


@pytest.fixture
def out(out_with_data, tmp_path):
  (tmp_path / "_data").symlink_to(out_with_data / "_data")
  return tmp_path


def cells_of(seeds=2, **sections) -> list[Cell]:
  """Cells that differ in seed_init, of the experiment `small`."""
  recipe = small_config(ARCH, data={"corpus": "small"}, **sections)
  grid = Grid("small", recipe, tuple(dataclasses.replace(recipe, seed_init=seed)
                                     for seed in range(seeds)))
  return [Cell(grid.name, "small.py:x", name, config)
          for name, config in zip(grid.names, grid.cells, strict=True)]


def finish(out: pathlib.Path, cell: Cell, steps=(2, 4), fingerprint=None,
           n_devices=1, bias=0.0) -> RunDir:
  """Leaves a run as the trainer does, but with initial parameters.

  `bias` is the selection bias of expert 0, where the router has one.
  """
  run_dir = RunDir.of(out, cell)
  run_dir.claim(cell)
  if fingerprint is None:
    fingerprint = prepare(cell.config.data, out / "_data").fingerprint
  state = init_state(cell.config, make_mesh(cell.config, jax.devices()[:n_devices]))
  state["router"] = jax.tree.map(lambda bias_LE: bias_LE.at[:, 0].set(bias), state["router"])
  with Checkpointer(run_dir, keep=2) as checkpointer:
    for step in steps:
      checkpointer.save(step, state, {}, {"data_fingerprint": fingerprint})
  run_dir.write_status({**STATUS, "state": run_dir_lib.FINISHED})
  return run_dir
