"""Everything that is kept under gs://: the driver, the agent and the verbs over an object store."""

import json
import re
import time

import pytest
from etils import epath

from launch import driver, remote
from launch.host.agent import Agent, Pace
from launch.jobs import read_launch
from launch.work import Work, from_text, to_text
from moe_jax.data import mirror
from moe_jax.files import read_json, write_json, write_text
from moe_jax.grid import select
from moe_jax.run_dir import RunDir
from tests.experiment_files import run_module, write, write_tiny
from tests.launch.agent_test import _here
from tests.launch.population_test import PATIENCE, SOURCE, curve, trainer
from tests.launch.submitter import TRAINER
from tests.launch.world import QUICK, World

OUT = "gs://bucket/runs"


def test_a_slice_is_driven_through_a_preemption(tmp_path, gcs):
  preempted = [*QUICK, (200, "SUSPENDED", "SERVICE", None)]
  world = World(tmp_path, lambda name, zone, attempt: preempted if attempt == 1 else QUICK, out=OUT)
  assert world.drive()
  world.check()
  (record,) = world.records()
  assert (record.preemptions, record.attempts, record.state) == (1, 2, "done")
  world.want()  # nothing twice
  assert world.drive() and world.cloud.created == 2
  assert driver.table(driver.read_all(world.folder))[0].startswith(f"{record.name}: done, ")


def test_what_other_machines_write_is_seen_at_once(gcs):
  """A listing that was kept would hide new files, and cut those that have grown."""
  folder = epath.Path("gs://bucket/seen/s0")
  write_json(folder / "now.json", {"sequence": 1})
  assert [file.name for file in folder.iterdir()] == ["now.json"]
  assert not (folder / "cancel").exists()
  gcs.put("bucket", "seen/s0/now.json", b'{"sequence": 2, "cells": ["a"]}', {})
  gcs.put("bucket", "seen/s0/cancel", b"", {})
  assert read_json(folder / "now.json") == {"sequence": 2, "cells": ["a"]}
  assert (folder / "cancel").exists()
  assert sorted(file.name for file in folder.iterdir()) == ["cancel", "now.json"]
  done = run_module("-c", "import moe_jax.train.__main__, fsspec; "
                    "print(fsspec.filesystem('gcs').dircache.use_listings_cache)")
  assert done.stdout == "False\n", done.stderr


def test_an_agent_works_there_and_its_runs_come_home(tmp_path, gcs, capfd):
  spec, file = write_tiny(tmp_path, seeds=1), epath.Path(f"{OUT}/tiny/_slices/s0/work.json")
  cells = {cell.name: ("python", str(TRAINER), "crash_once", f"--config={cell.selector}",
                       f"--out={OUT}") for cell in select(spec)}
  write_text(file, to_text(Work("s0", "tiny", OUT, cells, backend="test")))
  todo = from_text(file.read_text(), file)
  assert _here(Agent(todo, file.parent, "0-0", Pace(0.02, 0.02))) == 0
  (launch,) = (read_launch(todo.run_dir(name)) for name in todo.cells)
  assert (launch.state, launch.attempt) == ("finished", 2)
  done = run_module("-m", "launch.status", f"--config={spec}", f"--out={OUT}", "--json")
  (row,) = json.loads(done.stdout)
  assert (row["state"], row["step"], done.stderr) == ("finished", 20, "")
  done = run_module("-m", "launch.collect", f"--out={OUT}", "--experiment=tiny",
                    f"--to={tmp_path / 'here'}")
  assert (done.returncode, done.stderr) == (0, "")
  assert len(list((tmp_path / "here" / "tiny").glob("*/metrics/*.jsonl"))) == 2


_CELL = SOURCE + """
GRID = [override(RECIPE, {"execution.population": 1})]
"""


@pytest.mark.slow
def test_a_real_run_is_killed_there_and_goes_on_as_if_undisturbed(tmp_path, gcs, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  spec, here = write(tmp_path, _CELL, "packed.py"), tmp_path / "moe_jax" / "bucket" / "runs"
  (cell,) = select(spec)  # `here` is where the prepared data of OUT lie, too
  first = trainer(f"{spec}:{cell.name}", OUT)
  saved = RunDir.of(OUT, cell)
  deadline = time.monotonic() + PATIENCE
  while not saved.has_checkpoint(6):
    assert first.poll() is None and time.monotonic() < deadline
    time.sleep(0.01)
  first.kill()
  first.communicate(timeout=PATIENCE)
  for out in (OUT, here):
    process = trainer(f"{spec}:{cell.name}", out)
    told, error = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, error
    assert ("resuming from step" in told + error) == (out == OUT)
  assert curve(saved) == curve(RunDir.of(here, cell))


def test_texts_of_the_bucket_are_copied_to_where_they_can_be_mapped(tmp_path, gcs, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  for name, content in (("dataset/corpus.json", b"{}"), ("dataset/a/b.array_record", b"records")):
    gcs.put("bucket", f"runs/_data/stories/{name}", content, {})
  for _ in range(2):
    home = mirror.fetch(f"{OUT}/_data", ["stories/dataset", "nothing/dataset"])
    assert (home / "stories" / "dataset" / "a" / "b.array_record").read_bytes() == b"records"
    gcs.put("bucket", "runs/_data/stories/dataset/corpus.json", b'{"longer": 1}', {})
  assert (home / "stories" / "dataset" / "corpus.json").read_text() == '{"longer": 1}'
  assert home == tmp_path / "moe_jax" / "bucket" / "runs" / "_data"
  assert mirror.fetch(tmp_path, ["stories/dataset"]) == tmp_path


@pytest.mark.parametrize("command", [
    ("status",), ("cancel", "--experiment=tiny"),
    ("submit", "--backend=gke", "--topology=v6e-8", "--image=i:1")])
def test_a_store_out_of_reach_is_one_line(tmp_path, gcs, command):
  gcs.forbidden, (verb, *arguments) = True, command
  spec = () if "--experiment=tiny" in arguments else (f"--config={write_tiny(tmp_path)}",)
  done = run_module("-m", f"launch.{verb}", f"--out={OUT}", *arguments, *spec)
  assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
  assert f"error: --out='{OUT}': cannot be read or written: " in done.stderr


@pytest.mark.parametrize("out, why", [
    ("gs://no-such-bucket/runs", "bucket does not exist|no-such-bucket"),
    (OUT, "storage.objects.create")])
def test_where_nothing_can_be_written_one_line_says_why(gcs, out, why):
  gcs.read_only = True
  error = remote.why_not_writable(out)
  assert error.startswith(f"cannot write to --out={out}: ") and "\n" not in error
  assert re.search(why, error)
