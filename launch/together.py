"""Runs one trainer as several processes on this machine, which end together.

    python -m launch.together 4 python -m moe_jax.train --config=... --out=...

Each process gets --coordinator_address, --num_processes and --process_id. SIGTERM and SIGHUP are
forwarded to all (the terminal sends Ctrl-C to all itself). If one is killed, the others, which
could not continue without it, are killed at once. If one fails, they have GRACE_SECONDS to end by
themselves, with its error as their last line. The exit code is that of the first that failed.

JAX assigns the devices by its own rules: on CPUs each process has its own (fake) devices; a single
process drives all GPUs of a machine, so there is no need for more.
"""

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

POLL_SECONDS = 0.05
GRACE_SECONDS = 20.0


def command(n: int, trainer: Sequence[str]) -> tuple[str, ...]:
  """Returns the command that runs `trainer` as n processes; for n = 1, the trainer's own."""
  if n == 1:
    return tuple(trainer)
  return (sys.executable, "-m", "launch.together", str(n), *trainer)


def run(n: int, trainer: Sequence[str]) -> int:
  """Runs n processes. Returns the exit code, 128 + the signal's number if one was killed."""
  with socket.create_server(("localhost", 0)) as free:
    address = f"localhost:{free.getsockname()[1]}"
  children: list[subprocess.Popen] = []

  def pass_on(number, _):
    for child in children:
      child.send_signal(number)

  for number in (signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, pass_on)
  signal.signal(signal.SIGINT, lambda *_: None)  # the terminal sends it to the children too
  try:
    for i in range(n):
      children.append(subprocess.Popen([*trainer, f"--coordinator_address={address}",
                                        f"--num_processes={n}", f"--process_id={i}"]))
    return _wait(children)
  finally:
    for child in children:
      child.kill()
      child.wait()


def _wait(children: Sequence[subprocess.Popen]) -> int:
  """Waits for all processes, or until GRACE_SECONDS after the first failure."""
  until, first = float("inf"), 0
  while time.monotonic() < until:
    codes = [child.poll() for child in children]
    if first == 0 and (failed := [i for i, code in enumerate(codes) if code]):
      killed = [i for i in failed if codes[i] < 0]
      first = codes[(killed or failed)[0]]
      until = time.monotonic() + (0 if killed else GRACE_SECONDS)
      for i in killed:
        print(f"error: process {i} of {len(children)} was killed by "
              f"{signal.Signals(-codes[i]).name}; the others were killed", file=sys.stderr)
    if None not in codes:
      break
    time.sleep(POLL_SECONDS)
  return first if first >= 0 else 128 - first


def main(argv: Sequence[str]) -> int:
  if len(argv) < 3 or not argv[1].isdecimal() or int(argv[1]) < 1:
    print("error: usage: python -m launch.together N COMMAND...", file=sys.stderr)
    return 2
  return run(int(argv[1]), argv[2:])


if __name__ == "__main__":
  sys.exit(main(sys.argv))
