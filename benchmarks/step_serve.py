"""What a child of benchmarks.train_step does: a line names a part, a line of JSON answers."""

import json
import resource
import sys
import time
from typing import Any


def serve(peer: Any) -> None:
  """Answers lines `step`, `head`, ... by calling the method of that name, until input ends.

  An answer holds the value, the seconds, the processor's seconds and the process's peak memory.
  """
  print(json.dumps({"ready": peer.name}), flush=True)
  for line in sys.stdin:
    started, started_cpu = time.perf_counter(), time.process_time()
    value = getattr(peer, line.strip())()
    usage = resource.getrusage(resource.RUSAGE_SELF)
    print(json.dumps({"value": value, "seconds": time.perf_counter() - started,
                      "cpu_seconds": time.process_time() - started_cpu,
                      "peak_mb": usage.ru_maxrss / 1024}), flush=True)
