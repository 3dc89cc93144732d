"""The driver over a fake cloud by a virtual clock: every way a slice can end, nothing leaked,
nothing used that is not counted."""

import errno
import itertools
import json

import pytest

from launch import cloud, driver, lease, slices
from launch.code import Code
from launch.remote import Answer
from launch.slices import Policy
from moe_jax.errors import DamagedFile
from moe_jax.files import reaching
from tests.launch.world import PREEMPTED, QUICK, World, first

_CODE = Code("c", "a" * 64, "e.py", b"")


def test_slices_are_asked_for_worked_on_and_deleted(tmp_path):
  world = World(tmp_path, cells=4, slices=2)
  assert world.drive()
  world.check()
  assert [record.attempts for record in world.records()] == [1, 1]
  assert sum(line[4] == "create" for line in world.cloud.commands) == 2


def test_a_preempted_slice_is_deleted_and_asked_for_again(tmp_path):
  world = World(tmp_path, first(PREEMPTED))
  assert world.drive()
  world.check()
  (record,) = world.records()
  assert (record.preemptions, record.failures, record.attempts) == (1, 0, 2)
  assert any("preempted in us-east5-b" in line for line in world.said)


def test_what_a_user_suspended_is_not_brought_back(tmp_path):
  world = World(tmp_path, first([*QUICK, (200, "SUSPENDED", "USER", None)]))
  assert not world.drive()
  world.check()
  (record,) = world.records()
  assert (record.state, record.attempts) == (slices.CANCELLED, 1)
  assert "a user suspended it" in record.error


def test_what_somebody_deleted_is_not_brought_back(tmp_path):
  world = World(tmp_path)

  def sleep(seconds):
    world.sleep(seconds)
    for resource in world.cloud.active():
      resource.deleted = resource.deleted or world.cloud.now

  assert not world.driver(sleep).drive()
  world.check()
  assert world.records()[0].state == slices.CANCELLED


@pytest.mark.parametrize("timeline", [
    "RESOURCE_EXHAUSTED: Quota limit 'TPUV6EPreemptiblePerProjectPerZone' has been exceeded",
    [(30, "FAILED", "SERVICE", "There is no more capacity in the zone us-east5-b")],
    [(30, "WAITING_FOR_RESOURCES", None, None)]])
def test_a_zone_without_room_is_left_for_another(tmp_path, timeline):
  world = World(tmp_path, first(timeline))
  assert world.drive()
  world.check()
  (record,) = world.records()
  assert record.zone == "europe-west4-a"
  assert (record.preemptions, record.failures) == (0, 0)
  assert "us-east5-b" in record.exhausted


def test_no_zone_has_room_for_days_and_then_one_has(tmp_path):
  def timelines(name, zone, attempt):
    return QUICK if attempt > 20 else "RESOURCE_EXHAUSTED: no more capacity"

  world = World(tmp_path, timelines)
  assert world.drive()
  world.check()
  creates = [line for line in world.cloud.commands if line[4] == "create"]
  assert len(creates) == 21
  assert world.cloud.now > 8 * 3600  # each zone rested for an hour between two tries


def test_failing_resources_have_a_budget(tmp_path):
  world = World(tmp_path, lambda *_: [(30, "FAILED", "SERVICE", "internal error 13")],
                policy=Policy(max_failures=2))
  assert not world.drive()
  world.check()
  (record,) = world.records()
  assert (record.state, record.failures, record.error) == (slices.FAILED, 3, "internal error 13")


def test_preemptions_have_a_budget_of_their_own(tmp_path):
  world = World(tmp_path, lambda *_: [(1, "ACTIVE", None, None), (40, "SUSPENDED", "SERVICE",
                                                                   None)],
                policy=Policy(max_preemptions=3, max_failures=0))
  assert not world.drive()
  world.check()
  assert (world.records()[0].preemptions, world.records()[0].failures) == (4, 0)


def test_silent_machines_are_replaced(tmp_path):
  world = World(tmp_path, silent=True, policy=Policy(max_failures=1, silence=600))
  assert not world.drive()
  world.check()
  (record,) = world.records()
  assert record.attempts == 2
  assert record.error == "its machines were silent for 600 s"


def test_a_dirty_machine_is_replaced(tmp_path):
  world, looks = World(tmp_path), itertools.count()

  def sleep(seconds):
    active = world.cloud.active()
    # The next machine says nothing at first: what the dirty one said is not its word.
    world.silent = world.cloud.created == 1 or next(looks) < 6
    world.sleep(seconds)
    for resource in active if world.cloud.created == 1 else ():
      world.hear(resource.name, "dirty", "/dev/vfio/0 is held by process 41")

  assert world.driver(sleep).drive()
  world.check()
  (record,) = world.records()
  assert (record.preemptions, record.attempts) == (1, 2)


@pytest.mark.parametrize("hours", [-5, 5])
def test_clocks_that_differ_make_no_machine_silent(tmp_path, hours):
  world = World(tmp_path, policy=Policy(silence=60))
  world.skew = 3600.0 * hours
  assert world.drive()
  assert world.records()[0].attempts == 1


@pytest.mark.parametrize("content", ["", "[]", '{"heartbeat": "now"}', "null"])
def test_what_a_machine_said_and_nobody_can_read_says_nothing(tmp_path, content):
  world = World(tmp_path)

  def sleep(seconds):
    world.sleep(seconds)
    if world.ticks % 2:
      for file in world.folder.glob("*/host-0-0.json"):
        file.write_text(content)

  assert world.driver(sleep).drive()
  world.check()


@pytest.mark.parametrize("content", [
    "", "{", "[]", "null", '{"record": 3}',
    '{"record": {"name": "n"}, "options": {}, "label": ""}'])
def test_a_damaged_record_is_one_line_and_nothing_is_done(tmp_path, content):
  world = World(tmp_path)
  (file,) = world.folder.glob("*/slice.json")
  stored = json.loads(file.read_text())
  stored["record"]["held_seconds"] = "many"
  for text in (content, json.dumps(stored)):
    file.write_text(text)
    with pytest.raises(DamagedFile, match="slice.json': is damaged") as error:
      world.drive()
    assert "\n" not in str(error.value)
  assert world.cloud.commands == []


def test_a_disk_that_is_full_for_a_while_costs_time_alone(tmp_path, monkeypatch):
  """What could not be written down is not done, and nothing is forgotten."""
  world, real, full = World(tmp_path, first(PREEMPTED)), driver.write_json, [0]

  def write(path, value):
    full[0] += 1
    if full[0] % 7 > 3:
      raise OSError(errno.ENOSPC, "No space left on device")
    real(path, value)

  monkeypatch.setattr(driver, "write_json", write)
  world.unwatched = 600.0
  assert world.drive()
  world.check()
  assert world.cloud.created == 2
  assert any("retrying in 30 s: [Errno 28] No space left" in line for line in world.said)


def test_a_store_out_of_reach_is_tried_again_and_a_mistake_is_not(tmp_path, monkeypatch):
  world, real, wrong = World(tmp_path), driver.slices.decide, []
  out_of_reach = type("HttpError", (Exception,), {"__module__": "gcsfs.retry"})

  def decide(*arguments):
    wrong.append(out_of_reach("503") if not wrong else KeyError("a mistake"))
    if len(wrong) < 3:
      raise wrong[-1]
    return real(*arguments)

  monkeypatch.setattr(driver.slices, "decide", decide)
  with pytest.raises(KeyError, match="a mistake"), reaching("gs://bucket/runs"):
    world.drive()
  assert world.said == ["retrying in 30 s: 503"]
  assert world.drive()  # the lease was let go
  world.check()


_FAULTS = {
    "429": Answer(1, "", "ERROR: (gcloud) RESOURCE_EXHAUSTED: Quota exceeded for quota metric "
                  "'Requests' and limit 'Requests per minute' (429)"),
    "503": Answer(1, "", "ERROR: (gcloud) UNAVAILABLE: The service is currently unavailable. 503"),
    "ssh 255": Answer(255, "", "Connection reset by peer"),
    "hang": Answer(None, "", ""),
    "malformed": Answer(0, '{"name": "x", "sta', ""),
    "another shape": Answer(0, "[]", ""),
}


@pytest.mark.parametrize("fault", _FAULTS)
def test_answers_that_say_nothing_change_nothing(tmp_path, fault):
  seen = []

  def every_third(command):
    seen.append(command)
    if len(seen) % 3 == 0 and (command[4] != "create" or not _FAULTS[fault].ok):
      return _FAULTS[fault]
    return None

  world = World(tmp_path, first(PREEMPTED), every_third, cells=4, slices=2)
  world.unwatched = 300.0  # an interval whose end was not seen counts to the next look
  assert world.drive()
  world.check()
  assert all(record.failures == 0 for record in world.records())


@pytest.mark.parametrize("fault", [name for name, answer in _FAULTS.items() if not answer.ok])
def test_a_request_that_a_busy_cloud_refuses_is_made_again_in_the_same_zone(tmp_path, fault):
  """It says nothing of the zone's room, nor of the program."""
  refused = []

  def on_command(command):
    if command[4] != "create" or refused:
      return None
    refused.append(command)
    return _FAULTS[fault]

  world = World(tmp_path, on_command=on_command)
  assert world.drive()
  world.check()
  (record,) = world.records()
  assert (record.zone, dict(record.exhausted), record.failures) == ("us-east5-b", {}, 0)
  assert world.cloud.created == 1


def test_a_request_that_was_heard_though_it_seemed_lost_is_not_made_twice(tmp_path):
  world = World(tmp_path)
  run = world.cloud.run

  def lossy(command):
    answer = run(command)
    return Answer(None, "", "") if command[4] == "create" else answer

  world.cloud.run = lossy
  assert world.drive()
  world.check()
  assert world.cloud.created == 1


def test_an_expired_credential_is_said_and_nothing_is_lost(tmp_path):
  expired = [False]

  def on_command(command):
    return Answer(1, "", "ERROR: (gcloud) There was a problem refreshing your current auth "
                  "tokens: Reauthentication failed.") if expired[0] else None

  world = World(tmp_path, on_command=on_command)

  def sleep(seconds):
    world.sleep(seconds)
    expired[0] = bool(world.cloud.active())

  with pytest.raises(cloud.NoCredentials, match="gcloud auth login.*launch.watch"):
    world.driver(sleep).drive()
  expired[0] = False
  assert world.drive()
  world.check()
  assert world.cloud.created == 1


def test_somebody_elses_resource_of_the_same_name_is_left_alone(tmp_path):
  world = World(tmp_path)
  name = world.plan.slices[0].name
  world.cloud.run(("gcloud", "compute", "tpus", "queued-resources", "create", name,
                   "--project=p", "--zone=us-east5-b", "--labels=team=other"))
  assert not world.drive()
  (record,) = world.records()
  assert record.state == slices.FAILED
  assert "belongs to someone else; leaving it alone" in record.error
  assert record.held_seconds == 0
  assert len(world.cloud.present) == 1  # and not deleted


class _Killed(BaseException):
  pass


@pytest.mark.parametrize("when", ["before", "after", "new state"])
def test_a_driver_killed_anywhere_is_followed_by_another(tmp_path, when):
  """Before or after the n-th command, or when the n-th new state is written down; for every n."""
  for n in range(1, 100):
    folder = tmp_path / str(n)
    folder.mkdir()
    world, count = World(folder, first(PREEMPTED)), itertools.count(1)
    run, say = world.cloud.run, world.say

    def deadly_run(command, run=run, count=count, n=n):
      dies = next(count) == n
      if dies and when == "before":
        raise _Killed
      answer = run(command)
      if dies:
        raise _Killed
      return answer

    def deadly_say(line, count=count, n=n):
      if next(count) == n:
        raise _Killed

    if when == "new state":
      world.say = deadly_say
    else:
      world.cloud.run = deadly_run
    try:
      world.drive()
      break
    except _Killed:
      pass
    world.cloud.run, world.say = run, say
    world.cloud.now += 100
    world.unwatched = 200.0
    assert world.drive()
    world.check()
    assert world.cloud.created == 2, n
  assert n > 8


def test_what_was_asked_for_as_the_driver_died_is_deleted_by_a_cancel(tmp_path):
  """A record is written before what it says is done."""
  world = World(tmp_path)
  run = world.cloud.run

  def deadly(command):
    run(command)
    raise _Killed

  world.cloud.run = deadly
  with pytest.raises(_Killed):
    world.drive()
  assert world.cloud.created == 1
  world.cloud.run = run
  (world.folder / world.plan.slices[0].name / "cancel").touch()
  assert not world.drive()
  world.check()


def test_two_drivers_never_both_act(tmp_path):
  world = World(tmp_path)
  refused = []

  def sleep(seconds):
    world.sleep(seconds)
    with pytest.raises(lease.Held) as error:
      world.driver().drive()
    refused.append(str(error.value))

  assert world.driver(sleep).drive()
  assert len(refused) > 10
  assert "drives this experiment" in refused[0]
  world.check()
