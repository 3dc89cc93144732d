"""A world for testing the driver: a fake cloud, a grid, and machines that only pretend to work."""

import dataclasses
import random

from etils import epath

from launch import driver, slices
from launch.backends import gcloud
from launch.code import Code
from launch.driver import POLL_SECONDS, Driver
from launch.jobs import jobs_of
from launch.work import HostWord
from moe_jax.files import write_json
from moe_jax.grid import select
from moe_jax.run_dir import FINISHED
from tests.experiment_files import write_tiny
from tests.launch.fake_cloud import FakeCloud

ZONES = ("us-east5-b", "europe-west4-a")
WORK_SECONDS = 600.0  # of active machines that a slice's cells take
QUICK = [(30, "PROVISIONING", None, None), (60, "ACTIVE", None, None)]
PREEMPTED = [*QUICK, (200, "SUSPENDING", "SERVICE", None), (220, "SUSPENDED", "SERVICE", None)]


def first(timeline, then=QUICK):
  """Returns `timelines` with one timeline for the first resource and another for later ones."""
  return lambda name, zone, attempt: timeline if attempt == 1 else then


class World:
  """Runs a driver against a fake cloud; the clock advances only when the driver sleeps."""

  def __init__(self, tmp_path, timelines=lambda *_: QUICK, on_command=None, cells=2, slices=1,
               policy=None, silent=False, seed=0, out=None, **options):
    self.out = out or str(tmp_path / "runs")
    self.cloud = FakeCloud(timelines, on_command)
    self.options = gcloud.Options("p", ZONES, "v6e-8", slices=slices, **options)
    self.jobs = jobs_of(select(write_tiny(tmp_path, seeds=cells)), self.out, [])
    self.plan = gcloud.plan(self.jobs, self.options, Code("c", "a" * 64, "e.py", b""), self.out)
    self.folder = epath.Path(self.plan.out)
    self.said, self.worked, self.silent = [], {}, silent
    self.ticks, self.policy, self.seed = 0, policy, seed
    self.say = self.said.append
    self.want()

  def want(self):
    driver.want(self.plan, self.jobs, self.options, self.out, self.cloud.clock)

  def driver(self, sleep=None):
    return Driver(self.folder, self.cloud.run, self.cloud.clock, sleep or self.sleep,
                  random.Random(self.seed), self.policy, self.say)

  def sleep(self, seconds):
    """Advances the clock while the machines work."""
    self.ticks += 1
    assert self.ticks < 5000, self.said[-10:]
    self.cloud.now += seconds
    for resource in self.cloud.active():
      name = resource.name
      if self.silent or name not in [share.name for share in self.plan.slices]:
        continue
      self.worked[name] = self.worked.get(name, 0.0) + seconds
      self.hear(name)
      if self.worked[name] >= WORK_SECONDS:
        self.finish(name)

  def hear(self, name, state="working", trouble=None):
    """Writes a report of one of the slice's machines, by its own clock."""
    write_json(self.folder / name / "host-0-0.json", dataclasses.asdict(HostWord(
        state, trouble, None, "vm", 1, self.cloud.now + self.skew)))

  def finish(self, name):
    for job in self.jobs:
      if job.name in next(share.cells for share in self.plan.slices if share.name == name):
        job.run_dir.write_status({"state": FINISHED, "step": 20, "steps": 20})

  def drive(self):
    return self.driver().drive()

  def records(self):
    return [one.record for one in driver.read_all(self.folder)]

  def check(self):
    """Asserts that no resource is orphaned and that all machine time is accounted for."""
    self.cloud.active()  # what is gone by now is taken from the present
    assert not self.cloud.present, f"left behind: {list(self.cloud.present)}"
    counted, used = sum(record.held_seconds for record in self.records()), self.cloud.held()
    looks = sum(record.attempts for record in self.records()) * 5 * POLL_SECONDS
    assert used - 1e-6 <= counted <= used + looks + self.unwatched + 1e-6, (used, counted)
    assert all(record.state in slices.FINAL for record in self.records())

  skew = 0.0  # seconds by which the machines' clocks are ahead of the driver's
  unwatched = 0.0  # seconds without a driver, which may count as used
