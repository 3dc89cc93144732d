"""--max_cost_usd: what is counted is what was used, and new work stops before it is passed."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch import driver, money, slices
from launch.slices import Policy, Record
from moe_jax.files import read_json
from moe_jax.plan import topology
from tests.launch.world import QUICK, World

_MARGIN = Policy().margin
_RATE = 2.7 * 8 / 3600  # US dollars a second of a v6e-8


def _used(world):
  return world.cloud.held() * _RATE


def _limited(world, limit):
  world.options = dataclasses.replace(world.options, max_cost_usd=limit)
  world.want()


@pytest.mark.parametrize("limit", [1.0, 8.0, 40.0])
@pytest.mark.parametrize("n", [1, 3])
def test_what_is_used_never_passes_the_limit(tmp_path, limit, n, monkeypatch):
  monkeypatch.setattr("tests.launch.world.WORK_SECONDS", 1e6)  # it would never end by itself
  world = World(tmp_path, cells=3, slices=n, max_cost_usd=limit)
  assert not world.drive()
  world.check()
  assert _used(world) <= limit
  # What is left would not have paid for the slices while they are asked for and deleted.
  assert _used(world) > limit - n * _RATE * (_MARGIN + 300)
  assert world.cloud.created == min(n, int(limit / (_RATE * _MARGIN)))
  reason = f": spending would exceed --max_cost_usd={limit:g}: stopped at $"
  assert all(reason[2:] in record.error for record in world.records())
  assert sum(reason in line for line in world.said) == n  # once for each slice
  assert {record.state for record in world.records()} == {slices.CANCELLED}


def test_the_bill_is_the_machine_time(tmp_path):
  world = World(tmp_path, cells=2, slices=2, max_cost_usd=1000.0)
  assert world.drive()
  world.check()
  found = driver.read_all(world.folder)
  counted = money.spent((one.record, one.usd_per_second) for one in found)
  looks = 5 * driver.POLL_SECONDS * len(found) * _RATE
  assert _used(world) <= counted + 1e-9 <= _used(world) + looks
  assert driver.table(found)[-1].startswith(f"2 slices, at most ${counted:.2f} at on-demand")


def test_it_counts_what_earlier_submissions_spent_and_goes_on_with_more(tmp_path, monkeypatch):
  monkeypatch.setattr("tests.launch.world.WORK_SECONDS", 3000.0)
  world = World(tmp_path, max_cost_usd=8.0)
  assert not world.drive()
  first = _used(world)
  _limited(world, 8.0)
  assert not world.drive()  # nothing is left
  assert _used(world) == first
  _limited(world, 60.0)
  assert world.drive()
  world.check()
  assert first < _used(world) < 60.0
  (record,) = world.records()
  assert (record.state, record.error) == (slices.DONE, None)


def test_a_submission_changes_the_limit_of_slices_at_work(tmp_path):
  world = World(tmp_path)
  _limited(world, 5.0)
  (one,) = driver.read_all(world.folder)
  assert one.options.max_cost_usd == 5.0
  # its machines count too
  assert read_json(world.folder / "limit.json") == {"max_cost_usd": 5.0}
  assert one.work.usd_per_second == pytest.approx(_RATE)


def test_a_price_that_is_given_counts(tmp_path):
  world = World(tmp_path, usd_per_chip_hour=0.5)
  assert world.drive()
  (one,) = driver.read_all(world.folder)
  assert one.usd_per_second == pytest.approx(0.5 * 8 / 3600)
  assert "at the price given" in driver.table([one])[-1]
  assert money.usd_per_second(topology.parse("tpu7x-8"), None) is None


_RECORDS = st.lists(st.builds(
    Record, st.just("n"), st.sampled_from([slices.WAITING, *money._AT_RISK, slices.DONE]),
    looked=st.none() | st.floats(0, 100), held_seconds=st.floats(0, 1e4)), min_size=1, max_size=4)


@given(_RECORDS, st.floats(0, 200), st.floats(0.01, 100))
def test_less_is_never_refused_where_more_is_not(records, margin, limit):
  accounts = [(record, 0.01) for record in records]
  one = records[0]
  if not money.would_pass(accounts, one, limit, 100.0, margin):
    assert not money.would_pass(accounts, one, 2 * limit, 100.0, margin)
    assert not money.would_pass(accounts, one, limit, 100.0, margin / 2)
    assert money.spent(accounts) < limit


def test_a_preempted_experiment_pays_for_both_lives(tmp_path):
  preempted = [*QUICK, (200, "SUSPENDED", "SERVICE", None)]
  world = World(tmp_path, lambda name, zone, attempt: preempted if attempt == 1 else QUICK)
  assert world.drive()
  world.check()
  (one,) = driver.read_all(world.folder)
  assert one.record.held_seconds * one.usd_per_second >= _used(world) > 0
