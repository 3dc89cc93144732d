"""The lease: one holder, whatever dies or races; with files, and with create-if-absent alone."""

import json
import multiprocessing
import os
import subprocess
import sys

import pytest
from etils import epath

from launch import lease


class _Clock:
  now = 1000.0

  def __call__(self):
    return self.now


@pytest.fixture
def clock():
  return _Clock()


@pytest.fixture
def folder(tmp_path):
  return epath.Path(tmp_path) / "_slices"


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


def _race(folder, start, won):
  start.wait()
  try:
    won.put(lease.acquire(epath.Path(folder)).generation)
    start.wait()  # the winner lives until all have tried
  except lease.Held:
    won.put(None)
    start.wait()


def test_of_many_that_begin_at_once_one_drives(tmp_path):
  context = multiprocessing.get_context("spawn")
  start, won = context.Barrier(6), context.Queue()
  racers = [context.Process(target=_race, args=(str(tmp_path / "_slices"), start, won))
            for _ in range(6)]
  for racer in racers:
    racer.start()
  found = [won.get(timeout=60) for _ in racers]
  for racer in racers:
    racer.join()
  assert sorted(found, key=str) == [1, None, None, None, None, None]


def test_create_writes_whole_files_once(folder):
  assert lease.create(folder / "x", "first")
  assert not lease.create(folder / "x", "second")
  assert (folder / "x").read_text() == "first"
  assert [file.name for file in folder.iterdir()] == ["x"]
