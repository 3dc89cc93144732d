"""What a user asks of the driver, over the fake cloud: submitted again, cancelled, looked at."""

import dataclasses
import re

import pytest

from launch import driver, remote, slices
from launch.backends import gcloud
from launch.code import Code
from launch.remote import Answer
from moe_jax.errors import FieldError
from tests.experiment_files import run_module
from tests.launch.world import PREEMPTED, World, first

_CODE = Code("c", "a" * 64, "e.py", b"")


def test_submitting_again_submits_nothing_twice(tmp_path):
  world = World(tmp_path)
  before = world.records()
  world.want()
  assert world.records() == before
  assert world.drive()
  world.want()  # all is done: there is nothing to ask for
  assert world.drive()
  assert world.cloud.created == 1


def test_a_cell_is_never_two_slices(tmp_path):
  world = World(tmp_path, cells=4, slices=2)
  with pytest.raises(FieldError, match="belongs to slice tiny-0-.*run launch.cancel first"):
    world.plan = gcloud.plan(world.jobs, dataclasses.replace(world.options, slices=1),
                             _CODE, world.out)
    world.want()


def test_cancelling_deletes_whatever_there_is(tmp_path):
  world = World(tmp_path, cells=4, slices=2)

  def sleep(seconds):
    world.sleep(seconds)
    if world.ticks == 5:
      for share in world.plan.slices:
        (world.folder / share.name / "cancel").touch()

  assert not world.driver(sleep).drive()
  world.check()
  assert {record.state for record in world.records()} == {slices.CANCELLED}


def test_ctrl_c_says_what_still_runs_and_costs(tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(driver.signal, "signal", lambda *_: None)
  world = World(tmp_path)

  def sleep(seconds):
    world.sleep(seconds)
    if world.records()[0].held_seconds > 100:
      raise KeyboardInterrupt

  assert driver.drive(world.folder, world.cloud.run, clock=world.cloud.clock, sleep=sleep,
                      say=world.said.append) == 130
  _, stops, one, total, *hints = capsys.readouterr().out.split("\n")
  assert stops == "launcher stopped; the slices keep running:"
  assert one.startswith(f"{world.plan.slices[0].name}: active, ") and "at most $" in one
  assert total.startswith("1 slices, at most $")
  which = f"--out={world.out} --experiment=tiny"
  assert hints[:2] == [f"to watch again: python -m launch.watch {which}",
                       f"to cancel everything: python -m launch.cancel {which}"]
  assert world.drive()  # the lease was let go
  world.check()


# Before anything is created


@pytest.mark.parametrize("wrong, message", [
    ("accelerator-types", "v6e-8 in us-east5-b: ERROR: .*NOT_FOUND: no such accelerator"),
    ("nothing", "cannot write to --out=.*: ")])
def test_what_can_be_checked_is_checked_first(tmp_path, capsys, wrong, message):
  world = World(tmp_path, on_command=lambda command: Answer(
      1, "", "ERROR: (gcloud) NOT_FOUND: no such accelerator") if wrong in command else None)
  out = world.out
  if wrong == "nothing":
    out = str(tmp_path / "file")
    (tmp_path / "file").touch()
  assert gcloud.submit(world.plan, world.jobs, world.options, _CODE, out, world.cloud.run) == 1
  assert re.search(f"nothing was created: {message}", capsys.readouterr().out)
  assert world.cloud.created == 0


@pytest.mark.parametrize("location, warned", [
    ("EUROPE-WEST4", ["us-east5-b"]), ("EU", ["us-east5-b"]), ("EUR4", ["us-east5-b"]),
    ("US", ["europe-west4-a"]), ("NAM4", ["us-east5-b", "europe-west4-a"]),
    ("EUROPE-WEST", ["us-east5-b", "europe-west4-a"])])  # of no region but one like it in name
def test_a_bucket_of_several_regions_is_where_its_regions_are(tmp_path, capsys, monkeypatch,
                                                              location, warned):
  world = World(tmp_path, on_command=lambda command: Answer(0, f'{{"location": "{location}"}}', ""))
  monkeypatch.setattr(remote, "why_not_writable", lambda out: None)
  assert driver.preflight(world.options, "gs://bucket/runs", world.cloud.run) is None
  said = capsys.readouterr().out
  assert {zone for zone in world.options.zones if f"not {zone}'s" in said} == set(warned)


def test_a_bucket_elsewhere_is_warned_of(tmp_path, capsys, monkeypatch):
  world = World(tmp_path, on_command=lambda command: Answer(0, '{"location": "US-EAST5"}', ""))
  monkeypatch.setattr(remote, "why_not_writable", lambda out: None)
  assert driver.preflight(world.options, "gs://bucket/runs", world.cloud.run) is None
  said = capsys.readouterr().out
  assert "which is not europe-west4-a's region: traffic between them is charged" in said
  assert "us-east5-b's" not in said
  world.cloud._on_command = lambda command: Answer(0, "{}", "")
  assert driver.preflight(world.options, "gs://bucket/runs", world.cloud.run) is None
  assert "the bucket is in an unknown region" in capsys.readouterr().out


def test_the_account_is_shown_with_the_status(tmp_path):
  world = World(tmp_path, first(PREEMPTED))
  assert world.drive()
  done = run_module("-m", "launch.status", f"--config={tmp_path / 'tiny.py'}",
                    f"--out={world.out}")
  (record,) = world.records()
  hours = record.held_seconds / 3600 * 8
  assert f"{record.name}: done, {hours:.1f} chip-hours, at most ${hours * 2.7:.2f}" in done.stdout
  assert "1 preemptions" in done.stdout
