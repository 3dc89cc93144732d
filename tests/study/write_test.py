"""A written experiment file loads as the grid it was written from, whatever that holds."""

import dataclasses
import subprocess
import sys

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moe_jax.config import ExecutionConfig, MeshConfig
from moe_jax.errors import FieldError
from moe_jax.fields import override
from moe_jax.grid import Grid, load_grid
from moe_jax.study.write import source, write_experiment
from tests.experiment_files import ROOT
from tests.study.planted import RECIPE


def loaded(folder, grid):
  path = folder / "written.py"
  path.unlink(missing_ok=True)
  write_experiment(path, grid, "Which?")
  assert all(len(line) <= 100 for line in path.read_text().splitlines())
  return load_grid(str(path))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 9), st.floats(1e-7, 1), st.sampled_from([None, 3_000_000]),
       st.sampled_from(["a@9", "it's \"x\"@12", None]), st.lists(st.integers(1, 9), max_size=15))
@example(0, 4.500672648000426e-05, None, None, [])  # a line that is full before its last comma
def test_the_same_grid_comes_back(tmp_path_factory, seed, rate, n_total, branch, keep):
  changed = dataclasses.replace(
      RECIPE, seed_init=seed + 1,
      train=dataclasses.replace(RECIPE.train, learning_rate=rate, warmup_steps=0,
                                branch_from=branch),
      execution=ExecutionConfig(mesh=MeshConfig(expert=2), keep_steps=tuple(keep)))
  for recipe, cell in ((RECIPE, changed), (changed, override(RECIPE, {"seed_data": 3}))):
    grid = Grid("g", recipe, (cell, recipe), n_total)
    assert loaded(tmp_path_factory.mktemp("x"), grid) == grid


def test_it_is_clean(tmp_path):
  grid = Grid("g", RECIPE, (RECIPE, override(RECIPE, {"arch.n_topk": 2, "seed_init": 1})))
  file = tmp_path / "g.py"
  write_experiment(file, grid, "Which?")
  done = subprocess.run([sys.executable, "-m", "ruff", "check", "--config",
                         f"{ROOT}/pyproject.toml", str(file)], capture_output=True, text=True)
  assert done.returncode == 0, done.stdout + done.stderr
  assert source(grid, "Which?").startswith('"""Which?\n"""')


@pytest.mark.parametrize("name,line", [
    ("next.txt", "must end in .py"), ("nowhere/next.py", "in a directory that does not exist")])
def test_bad_paths(tmp_path, name, line):
  grid = Grid("g", RECIPE, (RECIPE,))
  with pytest.raises(FieldError, match=line):
    write_experiment(tmp_path / name, grid, "Which?")
  assert not list(tmp_path.iterdir())
