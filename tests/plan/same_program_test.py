"""The program that is planned is the program that is trained."""

import dataclasses
import re

import jax

from moe_jax.config import ExecutionConfig, MeshConfig
from moe_jax.mesh import make_mesh
from moe_jax.plan import topology, worker
from moe_jax.population import shape_of
from moe_jax.train.population import compiled_step
from tests.small import small_config


def test_the_plan_compiles_what_the_trainer_runs(tmp_path, monkeypatch):
  """On eight devices of this machine, which stand in for the slice. The planned cell differs from
  the trainer's shape in every number that a step takes as an argument."""
  config = small_config(execution={"mesh": MeshConfig(2, 2, 2), "remat": "rows"})
  config = dataclasses.replace(
      config, seed_init=3, train=dataclasses.replace(config.train, learning_rate=0.1, steps=77))
  monkeypatch.setattr(worker, "tpu_devices", lambda where: jax.devices()[:where.devices])
  planned = tmp_path / "planned.hlo"
  result = worker.compile_cell(config, topology.parse("v5litepod-8"), str(planned))
  trained = compiled_step(shape_of(config), make_mesh(config, jax.devices()[:8]), 1).as_text()
  assert without_sources(planned.read_text()) == without_sources(trained)
  assert result["mesh"] == {"data": 2, "fsdp": 2, "expert": 2} and result["flops"] > 0

  other = dataclasses.replace(config, execution=ExecutionConfig(mesh=MeshConfig(2, 2, 2)))
  changed = compiled_step(shape_of(other), make_mesh(other, jax.devices()[:8]), 1).as_text()
  assert without_sources(changed) != without_sources(trained)  # so the comparison can fail


def without_sources(text: str) -> str:
  """The module without who called it."""
  return re.sub(r" ?stack_frame_id=\d+", "", text[text.index("\n%"):])


def test_a_program_that_is_known_is_not_compiled_again(tmp_path, monkeypatch):
  """Numbers that a step takes as arguments make no other program."""
  monkeypatch.setattr(worker, "tpu_devices", lambda where: jax.devices()[:where.devices])
  where, kept = topology.parse("v5litepod-1"), str(tmp_path / "programs")
  config = small_config()
  first = worker.compile_cell(config, where, None, kept)
  (file,) = (tmp_path / "programs").iterdir()
  monkeypatch.setattr(jax.stages.Lowered, "compile", None)  # calling it would fail
  other = dataclasses.replace(config, seed_init=5)
  assert worker.compile_cell(other, where, None, kept) == first
  assert list((tmp_path / "programs").iterdir()) == [file]
