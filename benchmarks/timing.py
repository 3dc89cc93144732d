"""Times compiled programs that are compared with one another."""

import math
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import jax

Key = TypeVar("Key", bound=Hashable)

_LEAST_SECONDS = 0.01  # minimum duration of one timing


def fastest(programs: Mapping[Key, Callable[[], Any]], passes: int) -> dict[Key, float]:
  """Returns the seconds of each program's fastest call.

  Passes over all programs are interleaved, so that all see the same load. Short calls are batched,
  so that dispatch overhead does not dominate the timing.

  Args:
    programs: key -> a compiled program, bound to its inputs.
    passes: number of passes, after one more to warm up.
  """
  found = dict.fromkeys(programs, math.inf)
  for _ in range(passes + 1):
    for key, run in programs.items():
      calls = 1 if found[key] == math.inf else max(1, round(_LEAST_SECONDS / found[key]))
      started = time.perf_counter()
      jax.block_until_ready([run() for _ in range(calls)])
      found[key] = min(found[key], (time.perf_counter() - started) / calls)
  return found
