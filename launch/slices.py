"""The state machine of a slice's resource, independent of the states of its cells. Pure.

    waiting -> creating -> queued -> active -> deleting -> waiting, done, failed or cancelled

`decide` takes a record and what the cloud reports, and returns the next record and an action.
The record is saved before the action is taken, so a driver may die at any point.
"""

import dataclasses
import random as random_lib
from collections.abc import Mapping

WAITING, CREATING, QUEUED, ACTIVE = "waiting", "creating", "queued", "active"
DELETING, DONE, FAILED, CANCELLED = "deleting", "done", "failed", "cancelled"
FINAL = (DONE, FAILED, CANCELLED)

CREATE, DELETE = "create", "delete"  # actions

# A queued resource's states before it has machines, with them, and after.
_BEFORE = ("ACCEPTED", "CREATING", "WAITING_FOR_RESOURCES", "PROVISIONING")
_HELD = ("ACTIVE", "SUSPENDING")
_AFTER = ("SUSPENDED", "FAILED")


@dataclasses.dataclass(frozen=True)
class Policy:
  """Retry budgets, and times in seconds.

  Attributes:
    max_preemptions: how often machines may be taken away, or prove unusable.
    max_failures: how often a resource may fail, or its machines fall silent.
    pause, longest_pause: initial and maximum backoff, which doubles with each attempt in a row.
    patience: how long to wait for capacity in one zone if there are others.
    cooldown: how long a zone without capacity is avoided.
    silence: how long machines may go without a heartbeat before they are replaced.
    delete_again: how long until a deletion that shows no effect is requested again.
    arrival: how long after a request for a resource it may still appear.
    margin: how long the budget must still pay for all slices when a deletion is requested.
  """

  max_preemptions: int = 100
  max_failures: int = 5
  pause: float = 30.0
  longest_pause: float = 1800.0
  patience: float = 3600.0
  cooldown: float = 3600.0
  silence: float = 1800.0
  delete_again: float = 120.0
  arrival: float = 180.0
  margin: float = 600.0


@dataclasses.dataclass(frozen=True)
class Record:
  """What is known of one slice, stored in slice.json.

  Attributes:
    name: name of the resource.
    state, since: the state, see above, and when it began, in seconds since the epoch.
    zone: zone of the current or last resource.
    next_at: time before which nothing is tried.
    attempts: number of resources requested.
    requested: when a resource was last requested.
    preemptions, failures: how much of the budgets is used up.
    in_a_row: failed attempts since machines last worked.
    exhausted: zone -> time until which it is avoided.
    after: the state that follows a deletion.
    cancel: whether it is to end, by a person's wish or the spending limit.
    beat, heard: the machines' last heartbeat by their clocks, and when it arrived by the
      driver's, since these may differ.
    looked: when the cloud was last asked.
    may_hold: whether there may have been machines since then.
    held_seconds: upper bound on the time with machines: an interval between two looks counts
      unless there were certainly none.
    error: why it is not at work, in one line.
  """

  name: str
  state: str = WAITING
  since: float = 0.0
  zone: str | None = None
  next_at: float = 0.0
  attempts: int = 0
  requested: float = 0.0
  preemptions: int = 0
  failures: int = 0
  in_a_row: int = 0
  exhausted: Mapping[str, float] = dataclasses.field(default_factory=dict)
  after: str | None = None
  cancel: bool = False
  beat: float | None = None
  heard: float = 0.0
  looked: float | None = None
  may_hold: bool = False
  held_seconds: float = 0.0
  error: str | None = None


@dataclasses.dataclass(frozen=True)
class Seen:
  """A queued resource, as the cloud describes it.

  Attributes:
    state: its state, as Cloud TPU names it.
    initiator: who caused the state, USER or SERVICE.
    error: why it failed.
    ours: whether its label is this experiment's.
  """

  state: str
  initiator: str | None = None
  error: str | None = None
  ours: bool = True


@dataclasses.dataclass(frozen=True)
class Progress:
  """What the slice's machines and cells report.

  Attributes:
    ended: all cells are finished or given up.
    beat: the oldest of the machines' last heartbeats, by their own clocks; None until all of
      them have reported.
    trouble: why a machine is unusable.
  """

  ended: bool = False
  beat: float | None = None
  trouble: str | None = None


def is_about_capacity(error: str) -> bool:
  """Whether an error says that this zone lacks capacity, which another may have."""
  text = error.lower()
  return any(word in text for word in ("quota", "capacity", "stockout", "resource_exhausted",
                                       "resources to fulfill", "exhausted"))


def decide(record: Record, seen: Seen | None, progress: Progress, zones: tuple[str, ...],
           now: float, policy: Policy, random: random_lib.Random) -> tuple[Record, str | None]:
  """Returns the next record and the action to take: CREATE, DELETE or None.

  Args:
    record: the saved record.
    seen: what the cloud reports; None if there is no resource of that name.
    progress: progress of the slice's work.
    zones: zones to try, in this order.
    now: seconds since the epoch.
    policy: retry budgets and times.
    random: source of the jitter.
  """
  record = _billed(record, seen, now)
  if record.state in FINAL:
    return record, None
  if record.state == WAITING:
    return _wait(record, progress, zones, now, policy, random)
  if record.state == DELETING:
    return _go_on_deleting(record, seen, now, policy, random)
  if seen is not None and not seen.ours:
    return _to(record, FAILED, now, error=f"a queued resource {record.name} in {record.zone} "
               "belongs to someone else; leaving it alone"), None
  if progress.ended or record.cancel:
    return _end(record, seen, DONE if progress.ended else CANCELLED, now, policy)
  if seen is None:
    return _missing(record, now, policy, random)
  return _judge(record, seen, progress, zones, now, policy)


def _wait(record, progress, zones, now, policy, random):
  if record.cancel or progress.ended:
    return _to(record, DONE if progress.ended else CANCELLED, now), None
  if now < record.next_at:
    return record, None
  zone = min(zones, key=lambda zone: max(record.exhausted.get(zone, 0.0), now))
  until = record.exhausted.get(zone, 0.0)
  if until > now:
    return dataclasses.replace(record, next_at=until + random.uniform(0, policy.pause)), None
  return _to(record, CREATING, now, zone=zone, attempts=record.attempts + 1, may_hold=True,
             requested=now, next_at=now + _pause(record, policy, random)), CREATE


def _missing(record, now, policy, random):
  """Handles a resource that is missing though it should exist."""
  if record.state == CREATING:  # the driver died before the request, or it failed
    if now < record.next_at:
      return record, None
    return dataclasses.replace(record, in_a_row=record.in_a_row + 1, may_hold=True, requested=now,
                               next_at=now + _pause(record, policy, random)), CREATE
  return _to(record, CANCELLED, now,
             error=f"someone deleted it in {record.zone}; submit again to resume"), None


def _judge(record, seen, progress, zones, now, policy):
  match seen.state:
    case "FAILED":
      error = seen.error or "failed, no reason given"
      if is_about_capacity(error):
        return _leave_zone(record, error, now, policy)
      return _fail(record, error, now, policy)
    case "SUSPENDING" | "SUSPENDED" if seen.initiator == "USER":
      return _delete(record, CANCELLED, now, error="a user suspended it; submit again to resume")
    case "SUSPENDING" | "SUSPENDED":
      return _preempted(record, f"preempted in {record.zone}", now, policy)
    case "DELETING":
      return _to(record, DELETING, now, after=CANCELLED,
                 error="someone is deleting it; submit again to resume"), None
    case "ACTIVE":
      return _work(record, progress, now, policy)
  if record.state != QUEUED:
    return _to(record, QUEUED, now, error=None), None
  if len(zones) > 1 and now - record.since > policy.patience:
    return _leave_zone(record, f"no capacity in {record.zone} for {policy.patience:.0f} s", now,
                       policy)
  return record, None


def _work(record, progress, now, policy):
  if record.state != ACTIVE:
    return _to(record, ACTIVE, now, error=None), None
  if progress.trouble:
    return _preempted(record, f"its machine is unusable: {progress.trouble}", now, policy)
  if progress.beat not in (None, record.beat):
    return dataclasses.replace(record, beat=progress.beat, heard=now, in_a_row=0), None
  if now - max(record.since, record.heard) > policy.silence:
    return _fail(record, f"its machines were silent for {policy.silence:.0f} s", now, policy)
  return record, None


def _go_on_deleting(record, seen, now, policy, random):
  if seen is None:
    wanted = CANCELLED if record.cancel and record.after == WAITING else record.after
    return _to(record, wanted, now, after=None,
               next_at=now + _pause(record, policy, random)), None
  if not seen.ours:
    return _to(record, record.after, now, after=None), None
  if seen.state != "DELETING" and now >= record.next_at:
    return dataclasses.replace(record, next_at=now + policy.delete_again), DELETE
  return record, None


def _preempted(record, error, now, policy):
  preemptions = record.preemptions + 1
  spent = preemptions > policy.max_preemptions
  return _delete(dataclasses.replace(record, preemptions=preemptions),
                 FAILED if spent else WAITING, now, error=error)


def _fail(record, error, now, policy):
  failures = record.failures + 1
  spent = failures > policy.max_failures
  return _delete(dataclasses.replace(record, failures=failures, in_a_row=record.in_a_row + 1),
                 FAILED if spent else WAITING, now, error=error)


def _leave_zone(record, error, now, policy):
  exhausted = {**record.exhausted, record.zone: now + policy.cooldown}
  return _delete(dataclasses.replace(record, exhausted=exhausted), WAITING, now, error=error)


def refused(record: Record, error: str, retry: bool, now: float, policy: Policy) -> Record:
  """Returns the record after a CREATE that the cloud answered with an error.

  Args:
    record: the record that called for the CREATE.
    error: the cloud's message.
    retry: whether the same request may succeed later.
    now: seconds since the epoch.
    policy: retry budgets and times.
  """
  if not retry:
    record = dataclasses.replace(record, may_hold=False)
  if is_about_capacity(error) and not retry:
    return _to(record, WAITING, now, error=error,
               exhausted={**record.exhausted, record.zone: now + policy.cooldown})
  if retry:  # it may have arrived all the same: the next look shows
    return dataclasses.replace(record, error=error)
  failures = record.failures + 1
  return _to(record, FAILED if failures > policy.max_failures else WAITING, now, error=error,
             failures=failures, in_a_row=record.in_a_row + 1,
             next_at=max(record.next_at, now + policy.pause))


def _end(record, seen, state, now, policy):
  if seen is not None:
    return _delete(record, state, now)
  if record.state == CREATING and now < record.requested + policy.arrival:
    return record, None  # a request that timed out may still arrive: leave nothing behind
  return _to(record, state, now), None


def _delete(record, after, now, **changes):
  # The deletion is requested at the next look, once this record is saved.
  return _to(record, DELETING, now, after=after, next_at=now, **changes), None


def _to(record: Record, state: str, now: float, **changes) -> Record:
  return dataclasses.replace(record, state=state, since=now, **changes)


def _pause(record: Record, policy: Policy, random: random_lib.Random) -> float:
  """Returns an exponential backoff with jitter, so that slices do not all retry at once."""
  pause = policy.pause * 2**min(record.in_a_row, 20)
  return min(policy.longest_pause, pause) * random.uniform(0.5, 1.0)


def _billed(record: Record, seen: Seen | None, now: float) -> Record:
  """Counts the time since the last look, unless there were certainly no machines in it.

  A resource's states only move forward: one that has no machines yet never had any.
  """
  exists = seen is not None and seen.ours
  had_none = not record.may_hold and not (exists and seen.state in _HELD)
  if record.looked is None or had_none or (seen is not None and not seen.ours) or (
      exists and seen.state in _BEFORE):
    passed = 0.0
  else:
    passed = now - record.looked
  return dataclasses.replace(record, looked=now, held_seconds=record.held_seconds + passed,
                             may_hold=exists and seen.state not in _AFTER)
