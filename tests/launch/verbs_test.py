"""watch, cancel, gc, logs and collect: what they do with what a submission left."""

import dataclasses
import json
import os

import pytest
from etils import epath

from launch import budget, driver, lease, submitted
from launch.backends import gke, slurm
from launch.code import Code
from launch.jobs import jobs_of
from launch.remote import Answer
from moe_jax.config import identity_hash
from moe_jax.errors import FieldError
from moe_jax.files import write_text
from moe_jax.grid import select
from moe_jax.run_dir import RunDir
from tests.experiment_files import BASE, run_module, write_tiny
from tests.launch.world import World

_CODE = Code("c", "a" * 64, "e.py", b"")


def _write(plan):
  for share in plan.slices:
    for file in share.files:
      write_text(epath.Path(plan.out) / file.path, file.text)
  return epath.Path(plan.out)


@pytest.fixture
def tools(tmp_path):
  """A PATH whose kubectl and scancel write down what they were told."""
  folder = tmp_path / "tools"
  folder.mkdir()
  for name in ("kubectl", "scancel"):
    (folder / name).write_text(f'#!/bin/bash\necho {name} "$@" >> {tmp_path}/told\n')
    (folder / name).chmod(0o755)
  return f"{folder}:{os.environ['PATH']}"


def test_cancel_ends_jobsets_and_arrays(tmp_path, tools):
  jobs = jobs_of(select(write_tiny(tmp_path)), str(tmp_path / "runs"), [])
  _write(gke.plan(jobs, gke.Options("v6e-8", "i:1", namespace="team"), _CODE,
                  str(tmp_path / "runs")))
  folder = _write(slurm.plan(jobs, slurm.Options(), _CODE, str(tmp_path / "runs")))
  done = run_module("-m", "launch.cancel", f"--out={tmp_path / 'runs'}", "--experiment=tiny",
                    PATH=tools)
  assert done.returncode == 0, done.stderr
  jobset, array = (submitted.submissions(folder)[name][0].name for name in ("gke", "slurm"))
  assert (tmp_path / "told").read_text().splitlines() == [
      f"kubectl --namespace=team delete jobset {jobset} --ignore-not-found",
      f"scancel --me --name={array}"]


@pytest.mark.parametrize("command", ["watch", "cancel", "logs"])
def test_what_was_not_submitted_is_one_line(tmp_path, command):
  done = run_module("-m", f"launch.{command}", f"--out={tmp_path}", "--experiment=tiny")
  assert done.returncode == 2
  assert "--experiment='tiny': was not submitted to other machines" in done.stderr
  assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("command", ["watch", "cancel", "logs"])
def test_a_submission_that_failed_half_way_is_one_line(tmp_path, command):
  """The limit is written before any slice."""
  budget.set_limit(epath.Path(tmp_path / "tiny" / "_slices"), 5.0)
  done = run_module("-m", f"launch.{command}", f"--out={tmp_path}", "--experiment=tiny")
  assert done.returncode == 2
  assert done.stderr == ("error: --experiment='tiny': was only partly submitted: no machines "
                         "were requested; run the same launch.submit again\n")


def test_gc_finds_what_nobody_accounts_for(tmp_path):
  world = World(tmp_path)
  seen = []

  def sleep(seconds):
    world.sleep(seconds)
    seen.append(submitted.orphans(world.options, epath.Path(world.out), world.cloud.run))

  def create(name, label):
    world.cloud.run(("gcloud", "compute", "tpus", "queued-resources", "create", name,
                     "--project=p", "--zone=us-east5-b", f"--labels={label}"))

  create("lost", "moe-jax=tiny-00000000")
  create("not-ours", "team=other")
  assert world.driver(sleep).drive()
  assert all(found == [("lost", "us-east5-b", "moe-jax=tiny-00000000".partition("=")[2])]
             for found in seen)
  assert len(seen) > 5


def test_logs_are_followed_by_each_backends_own_tool(tmp_path):
  world = World(tmp_path)
  one = world.folder / world.plan.slices[0].name
  with pytest.raises(FieldError, match="is waiting: it has no machines"):
    submitted.log_command(one, "gcloud", "0", 10, True, None)
  lines = []

  def sleep(seconds):
    world.sleep(seconds)
    if world.records()[0].state == "active":
      lines.append(submitted.log_command(one, "gcloud", "all", 10, True, None))

  world.driver(sleep).drive()
  assert lines[0][:6] == ("gcloud", "compute", "tpus", "queued-resources", "ssh", one.name)
  assert "--worker=all" in lines[0]
  assert "--command=tail --lines=10 --follow=name --retry /var/lib/moe_jax/log.txt" in lines[0]
  assert submitted.log_command(one, "slurm", "3", 5, False, None) == (
      "tail", "--lines=5", f"{one}/log-3.txt")
  with pytest.raises(FieldError, match="worker='x; rm': must be a number or all"):
    submitted.log_command(one, "slurm", "x; rm", 5, False, None)


def test_collect_brings_all_but_checkpoints_and_only_what_is_new(tmp_path):
  (cell,) = select(f"{write_tiny(tmp_path)}:{BASE}")
  run_dir = RunDir.of(tmp_path / "there", cell)
  run_dir.claim(cell)
  run_dir.write_status({"state": "finished", "step": 20, "steps": 20})
  write_text(run_dir.metrics_file(1, 1), '{"step": 1}\n')
  write_text(run_dir.checkpoints / "20" / "big", "x" * 1000)
  write_text(run_dir.path.parent / "_slices" / "s0" / "work.json", "{}")
  run_dir.write_eval("heldout", {"loss": 1.0, "step": 20,
                                 "identity": identity_hash(cell.config)})
  command = ("-m", "launch.collect", f"--out={tmp_path / 'there'}", "--experiment=tiny",
             f"--to={tmp_path / 'here'}")
  done = run_module(*command)
  assert (done.returncode, done.stderr) == (0, "")
  here = tmp_path / "here" / "tiny"
  assert sorted(str(file.relative_to(here)) for file in here.rglob("*") if file.is_file()) == [
      f"{BASE}/config.json", f"{BASE}/eval/heldout.json", f"{BASE}/metrics/0001-00000001.jsonl",
      f"{BASE}/status.json", "results.csv"]
  assert submitted.copy_home(epath.Path(run_dir.path.parent), here) == (3, 1)
  write_text(run_dir.metrics_file(1, 1), '{"step": 1}\n{"step": 2}\n')
  assert submitted.copy_home(epath.Path(run_dir.path.parent), here) == (4, 0)
  assert json.loads((here / BASE / "status.json").read_text())["state"] == "finished"


def test_cancel_takes_over_from_a_driver_that_is_gone(tmp_path, capsys):
  world, looks = World(tmp_path, cells=1), []
  held = lease.acquire(world.folder)

  def sleep(seconds):
    looks.append(seconds)
    if len(looks) == 3:
      held.release()
    elif len(looks) > 3:
      world.sleep(seconds)

  assert driver.end_all(world.folder, sleep, run=world.cloud.run, clock=world.cloud.clock)
  assert len(looks) >= 3 and [record.state for record in world.records()] == ["cancelled"]
  assert capsys.readouterr().out.count("waiting for it to end the slices, or for its lease") == 1
  world.check()


def test_cancel_ends_when_whoever_drives_has_ended_the_slices(tmp_path):
  world = World(tmp_path, cells=1)
  lease.acquire(world.folder)
  assert driver.end_all(world.folder, lambda seconds: [
      dataclasses.replace(one, record=dataclasses.replace(one.record, state="cancelled")).write()
      for one in driver.read_all(world.folder)])
  assert world.cloud.created == 0


def test_the_cloud_is_listed_before_the_records_are_read(tmp_path, monkeypatch):
  """A record is there before its resource: what is listed first and in no record is an orphan."""
  world, order, real = World(tmp_path, cells=1), [], driver.read_all
  monkeypatch.setattr(submitted.driver, "read_all",
                      lambda folder: order.append("records") or real(folder))
  assert submitted.orphans(world.options, epath.Path(world.out),
                           lambda command: order.append("cloud") or Answer(0, "[]", "")) == []
  assert order == ["cloud"] * len(world.options.zones) + ["records"]
