"""The lease: one holder, whatever dies or races; with files, and on an object store."""

import concurrent.futures
import json
import os
import subprocess
import sys
import threading

import pytest
from etils import epath

from launch import lease
from moe_jax.errors import DamagedFile


class _Clock:
  now = 1000.0

  def __call__(self):
    return self.now


@pytest.fixture
def clock():
  return _Clock()


@pytest.fixture(params=["files", "objects"])
def folder(request, tmp_path):
  if request.param == "files":
    return epath.Path(tmp_path) / "_slices"
  request.getfixturevalue("gcs")
  return epath.Path(f"gs://bucket/{tmp_path.name}/_slices")


def test_one_holds_it_until_it_lets_go(folder, clock):
  first = lease.acquire(folder, clock)
  with pytest.raises(lease.Held, match=f"process {os.getpid()} on .* drives this experiment"):
    lease.acquire(folder, clock)
  first.release()
  assert lease.acquire(folder, clock).generation == first.generation + 1


def test_a_silent_holder_is_followed_and_may_not_act_again(folder, clock):
  first = lease.acquire(folder, clock)
  clock.now += lease.SECONDS + 30  # within what clocks may differ
  with pytest.raises(lease.Held):
    lease.acquire(folder, clock)
  clock.now += 60
  second = lease.acquire(folder, clock)
  for act in (first.renew, lambda: first.require(1.0)):
    with pytest.raises(lease.Lost, match="another driver took over"):
      act()
  first.release()  # of an old lease: the new one stays
  second.require(1.0)
  with pytest.raises(lease.Held):
    lease.acquire(folder, clock)


def test_it_is_renewed_before_it_could_run_out_in_an_action(folder, clock):
  held = lease.acquire(folder, clock)
  for _ in range(10):
    clock.now += 200
    held.require(120)
    assert held.written + lease.SECONDS >= clock.now + 120
  with pytest.raises(lease.Held):
    lease.acquire(folder, clock)


def test_a_holder_of_this_machine_that_was_killed_is_followed_at_once(folder, clock):
  held = lease.acquire(folder, clock)
  gone = subprocess.Popen([sys.executable, "-c", ""])
  gone.wait()
  file = folder / f"driver-{held.generation:08d}.json"
  file.write_text(json.dumps({**json.loads(file.read_text()), "pid": gone.pid}))
  assert lease.acquire(folder, clock).generation == held.generation + 1


def test_old_leases_are_removed_and_numbers_go_on(folder, clock):
  for generation in range(1, 30):
    held = lease.acquire(folder, clock)
    assert held.generation == generation
    held.release()
  assert len(list(folder.glob("driver-*.json"))) < 12


def test_of_many_that_begin_at_once_one_drives(folder):
  """Threads: what lets only one create a file is the file system, or the store."""
  start = threading.Barrier(6, timeout=60)

  def race(_):
    start.wait()
    try:
      return lease.acquire(folder).generation
    except lease.Held:
      return None

  with concurrent.futures.ThreadPoolExecutor(6) as racers:
    for generation in range(1, 4):
      found = sorted(racers.map(race, range(6)), key=str)
      assert found == [generation, None, None, None, None, None]
      lease.Lease(folder, generation, 0.0, lambda: 0.0).release()


def test_create_writes_whole_files_once(folder):
  assert lease.create(folder / "x", "first")
  assert not lease.create(folder / "x", "second")
  assert (folder / "x").read_text() == "first"
  assert [file.name for file in folder.iterdir()] == ["x"]


def test_an_object_whose_makers_answer_was_lost_is_its_makers(gcs):
  file = epath.Path("gs://bucket/lost/driver-00000001.json")
  gcs.answers_to_lose = 1
  assert lease.create(file, "mine")
  assert not lease.create(file, "another's")
  assert file.read_text() == "mine"


@pytest.mark.parametrize("content", [
    "", '{"host": "h", "pi', "[]", "7", "{}", '{"host": "h", "pid": "1", "written": 0}',
    '{"host": "h", "pid": 1, "written": null}'])
def test_a_damaged_lease_is_named(folder, clock, content):
  lease.acquire(folder, clock)
  (folder / "driver-draft.json").write_text("")  # a stray file is none
  file = folder / "driver-00000001.json"
  file.write_text(content)
  with pytest.raises(DamagedFile, match="driver-00000001.json': is damaged"):
    lease.acquire(folder, clock)
