"""Drives an experiment's slices until all have ended, from `<out>/<experiment>/_slices/`.

Each slice has a folder there with `slice.json` (its record and its options), `work.json`, and a
start-up script for each zone. Any machine that sees these files can drive, one at a time. A driver
may die at any point: each record is written before the action that it calls for.
"""

import dataclasses
import json
import random as random_lib
import signal
import time
from collections.abc import Callable, Sequence
from typing import Any

from etils import epath

from launch import budget, cloud, lease, money, remote, slices, work
from launch.backends import gcloud
from launch.backends.gcloud import Options
from launch.jobs import Job
from launch.plans import File, Plan, SlicePlan
from launch.slices import Policy, Progress, Record
from moe_jax.arch.hardware import PRICES_AS_OF
from moe_jax.errors import DamagedFile, FieldError
from moe_jax.fields import from_json
from moe_jax.files import is_of_storage, read_json, write_json
from moe_jax.run_dir import FINISHED

POLL_SECONDS = 30.0
_UNDELETED = "it cannot be deleted: "
_TOO_DEAR = "spending would exceed --max_cost_usd="

# Where the data of buckets lie that are in several regions: prefixes of zones.
# https://cloud.google.com/storage/docs/locations
_REGIONS = {"us": ("us",), "eu": ("europe",), "asia": ("asia",),
            "nam4": ("us-central1", "us-east1"), "eur4": ("europe-north1", "europe-west4"),
            "asia1": ("asia-northeast1", "asia-northeast2")}


@dataclasses.dataclass
class Slice:
  """The state of a slice, as read from its folder."""

  folder: epath.Path
  record: Record
  options: Options
  label: str

  @classmethod
  def read(cls, folder: epath.Path) -> "Slice":
    """Reads a slice's folder. Raises FieldError if slice.json is damaged."""
    stored = read_json(folder / "slice.json")
    try:
      return cls(folder, from_json(Record, stored["record"]),
                 from_json(Options, stored["options"]), str(stored["label"]))
    except (FieldError, KeyError, TypeError) as error:
      raise DamagedFile("out", str(folder / "slice.json"), f"is damaged: {error}") from None

  def write(self) -> None:
    write_json(self.folder / "slice.json", {
        "record": dataclasses.asdict(self.record), "options": dataclasses.asdict(self.options),
        "label": self.label})

  @property
  def work(self) -> work.Work:
    path = self.folder / "work.json"
    return work.from_text(path.read_text(), path)

  def plan(self) -> SlicePlan:
    """Returns the plan that creates the slice in its record's zone."""
    name, zone = self.record.name, self.record.zone
    script = self.folder / f"startup-{zone}.sh"
    return SlicePlan(name, (), (File(f"{name}/{script.name}", script.read_text()),),
                     (gcloud.create(name, self.options, zone, self.label),))

  def progress(self) -> Progress:
    todo = self.work
    hosts = [host for file in self.folder.glob("host-*.json") if (host := work.read_host(file))]
    troubles = [host.trouble for host in hosts if host.trouble]
    # A slice trains nothing without all of its hosts, so the longest silence counts.
    beat = min(host.heartbeat for host in hosts) if len(hosts) >= todo.hosts else None
    return Progress(all(work.why_ended(todo, name) for name in todo.cells), beat,
                    troubles[0] if troubles else None)

  def forget_machines(self) -> None:
    """Removes the files that earlier machines wrote, before new machines are requested."""
    for file in (*self.folder.glob("host-*.json"), self.folder / "now.json"):
      file.unlink(missing_ok=True)

  @property
  def chip_hours(self) -> float:
    return self.record.held_seconds / 3600 * self.options.slice.topology.chips

  @property
  def usd_per_second(self) -> float:
    return self.options.usd_per_second


def read_all(folder: epath.Path) -> list[Slice]:
  """Reads all slices of an experiment. Raises FieldError on a damaged file."""
  return [Slice.read(file.parent) for file in sorted(folder.glob("*/slice.json"))]


def want(planned: Plan, jobs: Sequence[Job], options: Options, out: str,
         clock: Callable[[], float] = time.time) -> None:
  """Records which slices are wanted. Of one already at work only limit and price are updated.

  Raises:
    FieldError: a cell belongs to another slice, which has not ended.
    lease.Held: another driver is at work.
  """
  folder = epath.Path(planned.out)
  held = lease.acquire(folder, clock)
  try:
    for share in planned.slices:  # before anything is written
      _require_free(folder, share)
    budget.set_limit(folder, options.max_cost_usd)
    for share in planned.slices:
      _want_one(folder, planned, share, jobs, options, gcloud.owner(out, planned.experiment))
  finally:
    held.release()


def _before(mine: epath.Path) -> Slice | None:
  return Slice.read(mine) if (mine / "slice.json").exists() else None


def _require_free(folder: epath.Path, share: SlicePlan) -> None:
  """Raises FieldError if another slice that has not ended has one of the share's cells."""
  mine = folder / share.name
  before = _before(mine)
  if before is not None and before.record.state not in slices.FINAL:
    return
  for other in read_all(folder):
    if other.folder != mine and other.record.state not in slices.FINAL:
      shared = set(other.work.cells) & set(share.cells)
      if shared:
        raise FieldError("slices", share.name, f"{min(shared)} belongs to slice "
                         f"{other.record.name}, which has not ended; run launch.cancel first")


def _want_one(folder: epath.Path, planned: Plan, share: SlicePlan, jobs: Sequence[Job],
              options: Options, label: str) -> None:
  mine = folder / share.name
  before = _before(mine)
  if before is not None and before.record.state not in slices.FINAL:
    before.options = dataclasses.replace(before.options, max_cost_usd=options.max_cost_usd,
                                         usd_per_chip_hour=options.usd_per_chip_hour)
    before.write()
    return
  remote.begin_anew(planned, share, jobs)
  remote.write_files(planned, share)
  held = before.record.held_seconds if before is not None else 0.0
  (mine / "cancel").unlink(missing_ok=True)
  Slice(mine, Record(share.name, held_seconds=held), options, label).write()


def preflight(options: Options, out: str, run: remote.Run) -> str | None:
  """Returns why nothing should be created, or None. Warns of a bucket in another region."""
  for zone in dict.fromkeys(options.zones):
    answer = run(gcloud.accelerator(options, zone))
    if not answer.ok:
      return f"{options.topology} in {zone}: {answer.error}"
  if (error := remote.why_not_writable(out)) is not None:
    return error
  if out.startswith("gs://"):
    answer = run(gcloud.bucket(options, out[5:].partition("/")[0]))
    if not answer.ok:
      return answer.error
    try:
      location = json.loads(answer.stdout)["location"].lower()
    except (json.JSONDecodeError, AttributeError, KeyError, TypeError):
      location = "an unknown region"
    regions = _REGIONS.get(location, (location,))
    for zone in options.zones:
      if not zone.startswith(tuple(f"{region}-" for region in regions)):
        print(f"warning: the bucket is in {location}, which is not {zone}'s region: traffic "
              "between them is charged")
  return None


class Driver:
  """Polls every slice, decides and acts, until all have ended."""

  def __init__(self, folder: epath.Path, run: remote.Run = remote.run,
               clock: Callable[[], float] = time.time,
               sleep: Callable[[float], Any] = time.sleep,
               random: random_lib.Random | None = None, policy: Policy | None = None,
               say: Callable[[str], Any] = print):
    self._folder, self._run, self._clock, self._sleep = folder, run, clock, sleep
    self._random = random or random_lib.Random()
    self._policy, self._say = policy or Policy(), say

  def drive(self) -> bool:
    """Drives until all slices have ended. Returns whether all are done.

    Raises:
      lease.Held, lease.Lost: another driver is at work.
      cloud.NoCredentials: a person must log in.
    """
    held = lease.acquire(self._folder, self._clock)
    try:
      while True:
        try:
          found = read_all(self._folder)
          for one in found:
            self._step(one, found, held)
          if all(one.record.state in slices.FINAL for one in found):
            return all(one.record.state == slices.DONE for one in found)
        except Exception as error:
          if not is_of_storage(error):
            raise
          # A full disk, an unreachable bucket: an action whose record is not written is not taken.
          self._say(f"retrying in {POLL_SECONDS:.0f} s: {' '.join(str(error).split())}")
        self._sleep(POLL_SECONDS)
    finally:
      held.release()

  def _step(self, one: Slice, found: Sequence[Slice], held: lease.Lease) -> None:
    if one.record.state in slices.FINAL:
      return
    held.require(remote.TIMEOUT_SECONDS)
    record, now = one.record, self._clock()
    try:
      seen = None if record.state == slices.WAITING else cloud.describe(
          record.name, one.options, record.zone, one.label, self._run)
    except cloud.Unclear as error:
      self._say(f"{record.name}: {error}")
      return
    progress, spent = one.progress(), self._why_too_dear(one, found)
    reason, error = None if progress.ended else spent, record.error or ""
    if seen is None and error.startswith(_UNDELETED):
      error = reason
    elif not error.startswith((_TOO_DEAR, _UNDELETED)):  # the amount grows until it is deleted
      error = reason or record.error
    record = dataclasses.replace(
        record, cancel=spent is not None or (one.folder / "cancel").exists(), error=error)
    record, action = slices.decide(record, seen, progress, one.options.zones, now, self._policy,
                                   self._random)
    held.require(remote.TIMEOUT_SECONDS)  # describe may have taken long, or this host slept
    self._keep(one, record)
    if action is not None:
      held.require(remote.TIMEOUT_SECONDS)
      self._act(one, action, held)

  def _why_too_dear(self, one: Slice, found: Sequence[Slice]) -> str | None:
    """Returns why a slice must end if the experiment would pass its spending limit, or None."""
    limits = [other.options.max_cost_usd for other in found
              if other.record.state not in slices.FINAL and other.options.max_cost_usd]
    accounts = [(other.record, other.usd_per_second) for other in found]
    if not limits or not money.would_pass(accounts, one.record, min(limits), self._clock(),
                                          self._policy.margin):
      return None
    return f"{_TOO_DEAR}{min(limits):g}: stopped at ${money.spent(accounts):.2f}"

  def _act(self, one: Slice, action: str, held: lease.Lease) -> None:
    if action == slices.DELETE:
      refused = cloud.delete(one.record.name, one.options, one.record.zone, self._run)
      if refused is not None or (one.record.error or "").startswith(_UNDELETED):
        held.require(remote.TIMEOUT_SECONDS)
        self._keep(one, dataclasses.replace(
            one.record, error=None if refused is None else _UNDELETED + refused))
      return
    one.forget_machines()
    answers = []
    remote.execute(one.plan(), lambda command: answers.append(self._run(command)) or answers[-1])
    error = cloud.create_error(answers[-1])
    if error is not None:
      held.require(remote.TIMEOUT_SECONDS)
      self._keep(one, slices.refused(one.record, *error, self._clock(), self._policy))

  def _keep(self, one: Slice, record: Record) -> None:
    before, one.record = one.record, record
    one.write()
    if (before.state, before.error) != (record.state, record.error):
      where, error = f" in {record.zone}" if record.zone else "", record.error or ""
      if error == before.error and error.startswith(_TOO_DEAR):  # told once for each slice
        error = ""
      self._say(f"{record.name}: {record.state}{where}" + (f": {error}" if error else ""))


def drive(folder: epath.Path, run: remote.Run = remote.run, **driver: Any) -> int:
  """Drives an experiment's slices and prints their final states. Returns the exit code."""
  signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
  try:
    done = Driver(folder, run, **driver).drive()
  except (lease.Held, lease.Lost, cloud.NoCredentials) as error:
    print(f"not driving the slices: {error}")
    done = False
  except KeyboardInterrupt:
    which = f"--out={folder.parent.parent} --experiment={folder.parent.name}"
    print("\nlauncher stopped; the slices keep running:")
    print("\n".join([*table(read_all(folder)), f"to watch again: python -m launch.watch {which}",
                     f"to cancel everything: python -m launch.cancel {which}"]))
    return 128 + signal.SIGINT
  found = read_all(folder)
  missing = [f"{name}: {why or 'unfinished'}" for one in found
             if one.record.state == slices.DONE for name in one.work.cells
             if (why := work.why_ended(one.work, name)) != FINISHED]
  print("\n".join([*table(found), *missing]))
  return 0 if done and not missing else 1


def end_all(folder: epath.Path, sleep: Callable[[float], Any] = time.sleep, **options: Any) -> bool:
  """Marks all slices for cancellation and sees that they end. Returns whether none is left.

  A live driver ends them; otherwise this process drives, once a dead driver's lease has expired.
  """
  for one in read_all(folder):
    if one.record.state not in slices.FINAL:
      (one.folder / "cancel").write_text("")
  told = False
  while _left(folder):
    try:
      lease.acquire(folder).release()
    except lease.Held as held:
      if not told:
        print(f"{held}; waiting for it to end the slices, or for its lease to expire", flush=True)
      told = True
      sleep(POLL_SECONDS)
      continue
    drive(folder, **options)
    break
  return not _left(folder)


def _left(folder: epath.Path) -> bool:
  return any(one.record.state not in slices.FINAL for one in read_all(folder))


def table(found: Sequence[Slice]) -> list[str]:
  """Returns a line per slice with its state and its usage, then a line with the total."""
  lines = []
  for one in found:
    record, cost = one.record, one.record.held_seconds * one.usd_per_second
    lines.append(f"{record.name}: {record.state}, {one.chip_hours:.1f} chip-hours, at most "
                 f"${cost:.2f}"
                 + (f", {record.preemptions} preemptions" if record.preemptions else "")
                 + (f", {record.failures} failures" if record.failures else "")
                 + (f": {record.error}" if record.error else ""))
  total = money.spent((one.record, one.usd_per_second) for one in found)
  given = all(one.options.usd_per_chip_hour is not None for one in found)
  return [*lines, f"{len(found)} slices, at most ${total:.2f} at "
          + ("the price given" if given else f"on-demand prices, {PRICES_AS_OF}")]
