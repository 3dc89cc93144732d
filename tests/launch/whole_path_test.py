"""From a grid to finished runs through a preemption: a gcloud on PATH whose machines really run the
start-up script, the agent and the trainer, on this machine."""

import json
import os
import random
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from etils import epath

from launch import driver, remote, slices
from launch.backends import gcloud
from launch.code import pack
from launch.jobs import plan, read_launch
from launch.slices import Policy
from moe_jax.grid import select
from moe_jax.mesh import make_mesh
from moe_jax.model import functional
from moe_jax.run_dir import RunDir
from tests.experiment_files import write_tiny
from tests.launch import fake_gcloud
from tests.train.checkpoint_states import restore_params

_SECRET = f"hunter2-{os.urandom(8).hex()}"  # not in this file, which is sent along


@pytest.fixture
def fake(tmp_path, monkeypatch):
  """The fake's folder; its gcloud comes first on PATH."""
  folder, tools = tmp_path / "cloud", tmp_path / "tools"
  folder.mkdir()
  tools.mkdir()
  tool = tools / "gcloud"
  tool.write_text(f'#!/bin/bash\nexec {sys.executable} {fake_gcloud.__file__} {folder} "$@"\n')
  tool.chmod(0o755)
  monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
  monkeypatch.setenv("MY_TOKEN", _SECRET)
  yield folder
  for home in folder.glob("machine-*"):  # whatever a failed test left running
    fake_gcloud._take_machine({"home": str(home)})


def _arrays(run_dir):
  config = run_dir.read_config()
  step, params, _ = restore_params(run_dir, functional.abstract_params(
      config, make_mesh(config, jax.devices())))
  return step, [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(params)]


def _losses(run_dir):
  return [(record["step"], record["loss"]) for record in run_dir.read_metrics()]


@pytest.mark.slow
def test_a_grid_goes_through_a_preemption_and_ends_as_if_undisturbed(tmp_path, fake, monkeypatch):
  spec, out = write_tiny(tmp_path, seeds=2), str(tmp_path / "runs")
  jobs = plan(select(spec), out, [])
  options = gcloud.Options("p", ("us-east5-b", "europe-west4-a"), "v6e-8", python=sys.executable)
  code = pack(spec)
  planned = gcloud.plan(jobs, options, code, out)
  (fake / "preempt_at.json").write_text(json.dumps(
      {"step": 7, "saved": f"{out}/tiny/{jobs[0].name}/checkpoints/5"}))
  monkeypatch.setattr(driver, "POLL_SECONDS", 0.2)
  remote.upload(code, out)
  driver.want(planned, jobs, options, out)
  said = []
  policy = Policy(pause=0.1, longest_pause=0.5, delete_again=1.0)
  done = driver.Driver(epath.Path(planned.out), random=random.Random(0), policy=policy,
                       say=said.append).drive()
  logs = "".join(file.read_text() for file in fake.glob("machine-*/log.txt"))
  assert done, "\n".join([*said, logs])

  (record,) = [one.record for one in driver.read_all(epath.Path(planned.out))]
  assert record.state == slices.DONE
  assert (record.preemptions, record.failures, record.zone) == (1, 0, "europe-west4-a")
  assert json.loads((fake / "cloud.json").read_text())["resources"] == {}
  attempts = [read_launch(job.run_dir).attempt for job in jobs]
  assert attempts == [2, 1]
  assert {job.run_dir.read_status()["commit"] for job in jobs} == {code.commit}

  alone = str(tmp_path / "alone")
  for shared in ("_data", "_compilation_cache"):  # the same programs, compiled once
    if (tmp_path / "runs" / shared).exists():
      shutil.copytree(tmp_path / "runs" / shared, tmp_path / "alone" / shared)
  disturbed = select(spec)[0]  # the only one that was
  machine = fake / "machine-1" / code.sha256  # the same code, whatever this tree has become
  done = subprocess.run(
      [sys.executable, "-m", "moe_jax.train", f"--config={code.experiment}:{disturbed.name}",
       f"--out={alone}"], cwd=machine, capture_output=True, text=True, timeout=300)
  assert done.returncode == 0, done.stderr
  ours, theirs = RunDir.of(out, disturbed), RunDir.of(alone, disturbed)
  assert [step for step, _ in _losses(ours)] == [10, 20]
  assert _losses(ours) == _losses(theirs)
  assert _arrays(ours) == _arrays(theirs)

  written = [file for root in (tmp_path / "runs", fake) for file in root.rglob("*")
             if file.is_file()]
  assert not [file for file in written if _SECRET.encode() in file.read_bytes()]
  assert [fake_gcloud.processes_of(home) for home in fake.glob("machine-*")] == [[], []]
