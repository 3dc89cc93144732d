"""The protocol of benchmarks.train_step with its children: a line per request, JSON per answer."""

import json
import resource
import sys
import time
from typing import Any


def serve(peer: Any) -> None:
  """Answers each input line (`step`, `head`, ...) by calling the method of that name.

  An answer holds the value, wall-clock seconds, CPU seconds and peak memory of the process.
  """
  print(json.dumps({"ready": peer.name}), flush=True)
  for line in sys.stdin:
    started, started_cpu = time.perf_counter(), time.process_time()
    value = getattr(peer, line.strip())()
    usage = resource.getrusage(resource.RUSAGE_SELF)
    print(json.dumps({"value": value, "seconds": time.perf_counter() - started,
                      "cpu_seconds": time.process_time() - started_cpu,
                      "peak_mb": usage.ru_maxrss / 1024}), flush=True)
