"""The driver where it is refused: deletions, submissions, its own lease, cells given up."""

import dataclasses
import pathlib

import pytest

from launch import driver, lease
from launch.backends import gcloud
from launch.code import Code
from launch.jobs import Launch, write_launch
from launch.remote import Answer
from moe_jax.errors import FieldError
from tests.launch.world import World

_CODE = Code("c", "a" * 64, "e.py", b"")


def _refusing_three_deletions():
  refused = []

  def on_command(command):
    if command[4] == "delete" and len(refused) < 3:
      refused.append(command)
      return Answer(1, "", "ERROR: (gcloud) PERMISSION_DENIED: tpu.delete denied")
    return None

  return on_command


def test_a_deletion_that_is_refused_is_told_and_tried_again(tmp_path):
  world = World(tmp_path, on_command=_refusing_three_deletions())
  assert world.drive()
  world.check()
  told = [line for line in world.said if "it cannot be deleted" in line]
  assert len(told) == 1 and "PERMISSION_DENIED" in told[0]


def test_a_refusal_and_the_limit_do_not_displace_each_other_at_every_look(tmp_path, monkeypatch):
  monkeypatch.setattr("tests.launch.world.WORK_SECONDS", 1e6)  # it would never end by itself
  world = World(tmp_path, on_command=_refusing_three_deletions(), max_cost_usd=8.0)
  assert not world.drive()
  world.check()
  told = [line.split(": ")[2] for line in world.said if line.count(": ") > 1]
  limit = "spending would exceed --max_cost_usd=8"
  assert told == [limit, "it cannot be deleted", limit]
  (record,) = world.records()
  assert record.error.startswith("spending would exceed --max_cost_usd=8: stopped at $")


def test_a_driver_that_slept_through_its_lease_writes_nothing(tmp_path):
  world = World(tmp_path, cells=1)
  first, real, slept = world.driver(), world.cloud.run, []

  def run(command):
    answer = real(command)
    if command[4] == "describe" and not slept:
      slept.append(1)
      world.cloud.now += 10_000.0
      world.after = lease.acquire(world.folder, world.cloud.clock)
      (record,) = world.records()
      world.before = record
    return answer

  first._run = run
  with pytest.raises(lease.Lost):
    first.drive()
  assert world.records() == [world.before]


def test_a_submission_that_is_refused_changes_nothing(tmp_path):
  world = World(tmp_path, cells=2, max_cost_usd=50.0)
  before = files_of(world)
  options = dataclasses.replace(world.options, slices=2, max_cost_usd=None)
  plan = gcloud.plan(world.jobs, options, _CODE, world.out)
  with pytest.raises(FieldError, match="belongs to slice"):
    driver.want(plan, world.jobs, options, world.out, world.cloud.clock)
  assert files_of(world) == before


def files_of(world):
  """All but the leases."""
  return {file: file.read_bytes() for file in pathlib.Path(world.folder).rglob("*")
          if file.is_file() and not file.name.startswith("driver-")}


def test_a_grid_of_which_a_cell_was_given_up_is_no_success(tmp_path, monkeypatch, capsys):
  world = World(tmp_path, cells=2)
  for number, job in enumerate(world.jobs):
    state = {"state": "refused" if number else "finished", "error": "bad input"}
    write_launch(job.run_dir, Launch("gcloud", (), 1, "vm", 1, 0.0, ended=1.0, **state))
  world.finish = lambda name: world.jobs[0].run_dir.write_status(
      {"state": "finished", "step": 20, "steps": 20})
  code = driver.drive(world.folder, world.cloud.run, clock=world.cloud.clock, sleep=world.sleep)
  assert code == 1
  assert f"{world.jobs[1].name}: given up: refused: bad input" in capsys.readouterr().out
