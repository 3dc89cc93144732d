"""Laws of the state machine that hold whatever the cloud says."""

import dataclasses
import random

from hypothesis import given, settings
from hypothesis import strategies as st

from launch import slices
from launch.slices import Policy, Progress, Record, Seen, decide, refused

_ZONES = ("a", "b")
_SEEN = st.none() | st.builds(
    Seen, st.sampled_from(["ACCEPTED", "CREATING", "WAITING_FOR_RESOURCES", "PROVISIONING",
                           "ACTIVE", "FAILED", "DELETING", "SUSPENDING", "SUSPENDED", "NEW"]),
    st.sampled_from([None, "USER", "SERVICE"]), st.sampled_from([None, "no capacity", "broken"]),
    st.booleans())
_PROGRESS = st.builds(Progress, st.booleans(), st.none() | st.floats(0, 1e5),
                      st.none() | st.just("dirty"))
_EVENTS = st.lists(st.tuples(_SEEN, _PROGRESS, st.floats(1, 4000), st.booleans(),
                             st.sampled_from([None, "quota exceeded", "bad request", "later"])),
                   max_size=40)


@settings(max_examples=300, deadline=None)
@given(_EVENTS, st.integers(0, 3))
def test_whatever_is_seen_budgets_hold_and_the_account_only_grows(events, budget):
  policy = Policy(max_preemptions=budget, max_failures=budget)
  record, now, chance = Record("n"), 0.0, random.Random(0)
  for seen, progress, passed, cancel, error in events:
    before, now = record, now + passed
    if cancel:
      record = dataclasses.replace(record, cancel=True)
    record, action = decide(record, seen, progress, _ZONES, now, policy, chance)
    assert record.held_seconds >= before.held_seconds
    assert record.preemptions <= budget + 1 and record.failures <= budget + 1
    if before.state in slices.FINAL:
      assert (record.state, action) == (before.state, None)
    if action == slices.CREATE:
      assert record.state == slices.CREATING and seen is None or before.state == slices.WAITING
      assert not record.cancel
      if error is not None:
        record = refused(record, error, error == "later", now, policy)
    if action == slices.DELETE:
      assert seen.ours and before.state == slices.DELETING  # it was written down before
    if record.preemptions > budget or record.failures > budget:
      assert record.state in (slices.DELETING, *slices.FINAL)


def test_pauses_grow_to_a_limit_and_differ():
  policy = Policy()
  def pause(n, seed):
    return slices._pause(Record("n", in_a_row=n), policy, random.Random(seed))

  assert all(15 <= pause(0, seed) <= 30 for seed in range(20))
  assert all(900 <= pause(50, seed) <= 1800 for seed in range(20))
  assert len({pause(3, seed) for seed in range(20)}) == 20


def test_zones_are_taken_in_order_and_rested_ones_again():
  def zone(exhausted, now=100.0):
    record, action = decide(Record("n", exhausted=exhausted), None, Progress(), _ZONES, now,
                            Policy(), random.Random(0))
    return record.zone if action else record.next_at

  assert zone({}) == "a"
  assert zone({"a": 500.0}) == "b"
  assert zone({"a": 50.0, "b": 500.0}) == "a"
  assert 300 <= zone({"a": 500.0, "b": 300.0}) <= 330


def test_a_request_that_may_still_arrive_is_waited_for_before_a_slice_counts_as_cancelled():
  policy = Policy()

  def step(record, seen, now):
    return decide(record, seen, Progress(), _ZONES, now, policy, random.Random(0))

  asked, action = step(Record("n"), None, 1000.0)
  assert action == slices.CREATE
  asked = refused(asked, "no answer in 120 s", True, 1120.0, policy)
  asked = dataclasses.replace(asked, cancel=True)
  waiting, action = step(asked, None, 1130.0)
  assert (waiting.state, action) == (slices.CREATING, None)  # and nothing new is requested
  late, _ = step(waiting, Seen("ACCEPTED"), 1160.0)
  assert (late.state, late.after) == (slices.DELETING, slices.CANCELLED)
  never, action = step(waiting, None, 1000.0 + policy.arrival)
  assert (never.state, action) == (slices.CANCELLED, None)
