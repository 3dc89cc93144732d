import types

import pytest

from benchmarks import timing


def test_the_fastest_call_counts_and_short_calls_are_batched(monkeypatch):
  """By a clock that only the programs move."""
  clock, calls = [0.0], {"short": 0, "long": 0}
  monkeypatch.setattr(timing, "time", types.SimpleNamespace(perf_counter=lambda: clock[0]))

  def program(name, seconds, first):
    def run():
      clock[0] += seconds if calls[name] else first
      calls[name] += 1
      return clock[0]
    return run

  found = timing.fastest({"short": program("short", 1e-3, 2e-3), "long": program("long", 5, 9)}, 2)
  assert found == pytest.approx({"short": 1e-3, "long": 5})
  assert calls == {"short": 1 + 5 + 10, "long": 3}  # a warm-up, then 10 ms or a call
