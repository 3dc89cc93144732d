"""The quickstart: what its cells compare, and its whole path with the real trainer."""

import collections
import csv
import dataclasses
import json
import math

import pytest

from experiments import quickstart
from moe_jax.arch import count
from moe_jax.config import identity
from moe_jax.grid import cell_name
from tests.experiment_files import run_module, write

# What the grid varies, and what gives way so that N_total holds.
VARIED = {"arch.n_exp", "arch.n_topk", "arch.d_model", "arch.d_expert"}


@pytest.fixture(scope="module")
def grid():
  return quickstart.get_grid()


def test_every_cell_has_the_grids_size(grid):
  assert len(grid.cells) >= 6
  assert len(set(grid.names)) == len(grid.cells)
  for config in grid.cells:
    assert abs(count.n_total(config.arch) - grid.n_total) <= 5e-3 * grid.n_total


def test_it_varies_sparsity_and_experts_one_at_a_time(grid):
  sparsities, experts = collections.defaultdict(set), collections.defaultdict(set)
  for config in grid.cells:
    sparsities[config.arch.n_exp].add(config.arch.sparsity)
    experts[config.arch.sparsity].add(config.arch.n_exp)
  assert max(map(len, sparsities.values())) >= 3
  assert max(map(len, experts.values())) >= 3


def test_all_else_is_held(grid):
  for config in grid.cells:
    ours, recipe = identity(config), identity(grid.recipe)
    assert {path for path in recipe if ours[path] != recipe[path]} <= VARIED
    assert config.execution == grid.recipe.execution
    # The solver may only choose widths that keep the granularity, to within their rounding.
    assert config.arch.granularity == pytest.approx(2, rel=0.1)


TWO_CELLS = """
import dataclasses
from experiments import quickstart

def get_grid():
  grid = quickstart.get_grid()
  return dataclasses.replace(grid, name="two", cells=grid.cells[1:3])
"""
TINY = ["--config.train.steps=6", "--config.train.warmup_steps=1",
        "--config.execution.checkpoint_every=3"]


@pytest.mark.slow
def test_from_the_grid_to_the_plot(grid, tmp_path):
  """The commands of the quickstart, on two of its cells and a few steps."""
  spec, out = write(tmp_path, TWO_CELLS, "two.py"), tmp_path / "runs"

  def command(module, *arguments):
    done = run_module("-m", module, f"--config={spec}", f"--out={out}", *arguments, *TINY,
                      timeout=600, XLA_FLAGS="")  # one device, compiled as for a user
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout

  assert "0 already finished, 2 to run" in command("launch.submit", "--parallel=2")
  statuses = [file.read_bytes() for file in sorted(out.glob("two/*/status.json"))]
  assert "2 already finished, 0 to run" in command("launch.submit", "--parallel=2")
  assert [file.read_bytes() for file in sorted(out.glob("two/*/status.json"))] == statuses

  wanted = {}  # the names tell what was overridden
  for config in grid.cells[1:3]:
    train = dataclasses.replace(config.train, steps=6, warmup_steps=1)
    changed = dataclasses.replace(config, train=train)
    wanted[cell_name(changed, grid.recipe)] = count.n_total(config.arch)
  states = json.loads(command("launch.status", "--json"))
  assert [(row["cell"], row["state"], row["step"], row["n_total"]) for row in states] == [
      (name, "finished", 6, n_total) for name, n_total in wanted.items()]

  shown = command("moe_jax.evaluate")
  with (out / "two/results.csv").open() as file:
    rows = list(csv.DictReader(file))
  assert {row["cell"]: int(row["n_total"]) for row in rows} == wanted
  for row in rows:
    assert float(row["drop_rate"]) < 1
    # Six steps teach little, but no loss is far from that of guessing, log(vocabulary).
    assert 0 < float(row["loss"]) < math.log(quickstart.RECIPE.arch.vocab_size) + 1
    (line,) = [line.split() for line in shown.splitlines()
               if line.split()[:1] == [row["cell"]] and "±" in line]
    assert f"{float(row['loss']):.4f}" in line
  assert (out / "two/results.png").read_bytes().startswith(b"\x89PNG\r\n")
