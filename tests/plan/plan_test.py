"""The whole command with the real compiler, for slices that are not there."""

import csv
import gzip
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

from moe_jax.grid import load_grid
from moe_jax.plan import cost, hlo, topology
from tests.experiment_files import ROOT, run_module, write
from tests.plan import libtpu
from tests.plan.executed import executed_flops

pytestmark = pytest.mark.slow

_SOURCE = '''"""Which of these fit?"""

import dataclasses

from moe_jax.config import (Architecture, DataConfig, ExecutionConfig, MeshConfig, ModelConfig,
                            RunConfig, TrainConfig)
from moe_jax.grid import Grid

RECIPE = RunConfig(
    arch=Architecture(n_layers=2, d_model=128, d_expert=64, n_exp=8, n_topk=2, n_heads=2),
    model=ModelConfig(compute_dtype="bfloat16"), data=DataConfig(seq_len=128),
    train=TrainConfig(steps=100, batch_size=16, warmup_steps=2),
    execution=ExecutionConfig(remat="full", mesh=MeshConfig(expert=4)))


def get_grid():
  odd = dataclasses.replace(RECIPE, train=dataclasses.replace(RECIPE.train, batch_size=12))
  return Grid("tiny", RECIPE, (RECIPE, odd))
'''


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
  """One cell that compiles and one whose batch does not divide."""
  folder = tmp_path_factory.mktemp("plan")
  file = write(folder, _SOURCE)

  def run():
    return run_module(
        "-m", "moe_jax.plan", f"--config={file}", "--topology=v5litepod-8",
        f"--out={folder / 'runs'}", f"--csv={folder / 'plan.csv'}",
        f"--json={folder / 'plan.json'}", timeout=500, **libtpu.environment())

  return folder, run, run()


def test_every_cell_has_its_row(planned):
  folder, _, done = planned
  assert done.returncode == 1, done.stderr  # one cell has no plan
  assert "1 of 2 cells planned on v5litepod-8" in done.stdout
  good, odd = csv.DictReader((folder / "plan.csv").open())
  assert good["fits"] == "True" and float(good["step_seconds"]) > 0
  assert odd["fits"] == "" and "train.batch_size=12" in odd["error"]
  assert float(good["priced_seconds"]) + float(good["estimated_seconds"]) == pytest.approx(
      float(good["step_seconds"]))


def test_its_flops_are_those_that_are_counted(planned):
  folder, _, _ = planned
  config = load_grid(str(folder / "tiny.py")).cells[0]
  (good, _) = json.loads((folder / "plan.json").read_text())
  assert good["flops_per_device"] == pytest.approx(executed_flops(config, 8), rel=0.01)


def test_it_is_not_compiled_twice(planned):
  folder, run, first = planned
  kept = {file: file.stat().st_mtime_ns for file in (folder / "runs" / "_plans").glob("*.json")}
  assert len(kept) == 1
  second = run()
  assert {file: file.stat().st_mtime_ns for file in kept} == kept
  assert second.stdout.splitlines()[-1] == first.stdout.splitlines()[-1]


def test_it_shows_its_text_and_what_fills_the_memory(planned):
  folder, _, _ = planned
  done = run_module("-m", "moe_jax.plan", f"--config={folder / 'tiny.py'}:l2-d128-f64-e8-k2",
                    "--topology=v5litepod-8", f"--out={folder / 'runs'}", "--memory_profile",
                    f"--hlo_out={folder / 'hlo'}", timeout=300, **libtpu.environment())
  assert done.returncode == 0, done.stderr
  (text,) = (folder / "hlo").iterdir()
  assert text.name == "l2-d128-f64-e8-k2.v5litepod-8.hlo.txt"
  assert hlo.parse(text.read_text()).entry
  listed = done.stdout.partition("the largest live buffers")[2].splitlines()[1:]
  sizes = [float(found[1]) for line in listed
           if (found := re.match(r" +([0-9.]+) MiB  \w+\[", line))]
  assert len(sizes) > 5 and sizes == sorted(sizes, reverse=True)
  assert len(list((folder / "runs" / "_plans" / "programs").iterdir())) == 1  # not compiled again


def test_a_search_recommends_the_fastest_of_what_it_compiles(planned):
  folder, _, _ = planned
  done = run_module("-m", "moe_jax.plan", f"--config={folder / 'tiny.py'}:l2-d128-f64-e8-k2",
                    "--topology=v5litepod-8", f"--out={folder / 'runs'}", "--search", "--tries=2",
                    f"--json={folder / 'search.json'}", timeout=500, **libtpu.environment())
  assert done.returncode == 0, done.stderr
  rows = json.loads((folder / "search.json").read_text())
  assert len(rows) == 2 and all(row["fits"] for row in rows)
  best = min(rows, key=lambda row: row["step_seconds"])
  said = re.search(r"^l2-d128-f64-e8-k2: ([0-9.]+) ms a step with (.*)$", done.stdout, re.M)
  assert float(said[1]) == pytest.approx(1e3 * best["step_seconds"], abs=0.05)
  assert f"--config.execution.mesh.expert={best['mesh_expert']} " in said[2]


def test_the_kept_module_reads_as_a_fresh_one(tmp_path):
  """The format that the fast tests rely on is still what libtpu writes."""
  fresh = run_module("-c", "import os; from moe_jax.plan import worker; "
                     "os.environ.update(worker.ENVIRONMENT); "
                     "from tests.plan.make_fixtures import scan_and_collectives; "
                     "print(scan_and_collectives())", timeout=300, **libtpu.environment())
  assert fresh.returncode == 0, fresh.stderr
  text = fresh.stdout[fresh.stdout.index("HloModule"):]
  with gzip.open(ROOT / "tests/plan/fixtures/scan.v5litepod-8.hlo.gz", "rt") as file:
    kept = file.read()
  from tests.plan.cost_test import EIGHT
  where = topology.parse("v5litepod-8")
  a, b = (cost.estimate(hlo.parse(t), EIGHT, where) for t in (text, kept))
  assert a.flops == b.flops and set(a.by_collective()) == set(b.by_collective())
  assert re.search("is_scheduled=true", text)


_PRODUCTS = """
import dataclasses, os
from moe_jax.plan import topology, worker
os.environ.update(worker.ENVIRONMENT)
from moe_jax.mesh import make_mesh
from moe_jax.train.step import lower_train_step
from tests.plan import executed

config = executed.STEPS["moe-full"]
config = dataclasses.replace(config, model=dataclasses.replace(config.model,
                                                               compute_dtype="float32"))
mesh = make_mesh(config, worker.tpu_devices(topology.parse("v5litepod-8")))
products = [line for line in lower_train_step(config, mesh).as_text().splitlines()
            if "dot_general" in line]
print(len(products), sum("precision = [HIGHEST, HIGHEST]" in line for line in products))
"""


def test_float32_on_a_tpu_is_float32_in_every_product_of_a_step():
  done = run_module("-c", _PRODUCTS, timeout=300, **libtpu.environment())
  assert done.returncode == 0, done.stderr
  products, told = map(int, done.stdout.split())
  assert products == told > 30


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_ends_with_its_compilers(tmp_path, number):
  """And at once: each would work on for minutes."""
  command = subprocess.Popen(
      [sys.executable, "-m", "moe_jax.plan", "--config=experiments/reference.py",
       "--topology=v5p-64", f"--out={tmp_path}"], cwd=ROOT, stdout=subprocess.PIPE,
      stderr=subprocess.PIPE, text=True, env=os.environ | libtpu.environment())

  def workers():
    return [pid for file in pathlib.Path(f"/proc/{command.pid}/task").glob("*/children")
            for pid in file.read_text().split()]

  while not (found := workers()):
    assert command.poll() is None, command.communicate()
    time.sleep(0.1)
  time.sleep(4)  # they import JAX, or compile
  command.send_signal(number)
  _, stderr = command.communicate(timeout=10)
  assert command.returncode == 128 + signal.SIGINT and "interrupted" in stderr
  assert not any(pathlib.Path(f"/proc/{pid}/exe").exists() for pid in found)
