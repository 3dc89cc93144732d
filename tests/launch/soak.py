"""Plays random timelines, faults and driver deaths against a fake cloud on a virtual clock.

    python -m tests.launch.soak --timelines=1000

After each, no resource may be orphaned, and no machine time may be missing from the account. A
failing seed is printed; `--first=SEED --timelines=1` replays it.
"""

import pathlib
import random
import tempfile
import time

from absl import app, flags

from launch.remote import Answer
from launch.slices import Policy
from tests.launch.world import QUICK, World

_TIMELINES = flags.DEFINE_integer("timelines", 1000, "How many.")
_FIRST = flags.DEFINE_integer("first", 0, "First seed.")
_FAULTS = (
    Answer(1, "", "ERROR: (gcloud) Quota exceeded, limit 'Requests per minute' (429)"),
    Answer(1, "", "ERROR: (gcloud) UNAVAILABLE: 503"), Answer(255, "", "Connection reset"),
    Answer(None, "", ""), Answer(0, '{"na', ""), Answer(0, "[]", ""))
_ERRORS = ("RESOURCE_EXHAUSTED: Quota limit has been exceeded", "There is no more capacity",
           "INTERNAL: try again 500", "INVALID_ARGUMENT: a bad day")


class Killed(BaseException):
  """Simulates the death of the driver."""


def timeline(chance: random.Random) -> list | str:
  """Returns a queued resource's random timeline, or the error text that answers its creation."""
  if chance.random() < 0.15:
    return chance.choice(_ERRORS)
  waits = [(chance.uniform(1, 300), "WAITING_FOR_RESOURCES", None, None)]
  kind = chance.random()
  if kind < 0.1:  # for ever
    return waits
  if kind < 0.25:
    return [*waits, (400, "FAILED", "SERVICE", chance.choice(_ERRORS))]
  begins = 300 + chance.uniform(1, 600)
  works = [*waits, (begins - 1, "PROVISIONING", None, None), (begins, "ACTIVE", None, None)]
  if kind < 0.6:
    return works
  ends = begins + chance.uniform(10, 2000)
  who = "USER" if chance.random() < 0.05 else "SERVICE"
  return [*works, (ends, "SUSPENDING", who, None), (ends + 30, "SUSPENDED", who, None)]


def play(seed: int, folder: pathlib.Path) -> str:
  """Plays one random life of an experiment. Returns how it ended; raises if a check fails."""
  chance = random.Random(seed)

  def timelines(name, zone, attempt):
    return timeline(chance) if attempt < 25 else QUICK

  def on_command(command):
    if chance.random() < 0.02:
      raise Killed
    fault = chance.choice(_FAULTS)
    spoils = chance.random() < 0.05 and not (fault.ok and command[4] != "describe")
    return fault if spoils else None

  world = World(folder, timelines, on_command, cells=chance.randint(1, 4),
                slices=chance.randint(1, 3), seed=seed,
                policy=Policy(max_failures=chance.randint(0, 5), patience=1200))
  while True:
    try:
      done = world.drive()
      break
    except Killed:
      away = chance.uniform(0, 2000)
      world.cloud.now += away
      world.unwatched += 2 * (away + 60) * len(world.plan.slices)
  # An answer that said nothing widens the interval that is counted.
  world.unwatched += 60.0 * len(world.cloud.commands)
  world.check()
  return "done" if done else "given up"


def main(_):
  started, ended = time.monotonic(), {}
  for seed in range(_FIRST.value, _FIRST.value + _TIMELINES.value):
    with tempfile.TemporaryDirectory() as folder:
      try:
        how = play(seed, pathlib.Path(folder))
      except Exception:
        print(f"seed {seed} fails")
        raise
    ended[how] = ended.get(how, 0) + 1
    played = sum(ended.values())
    if played % 100 == 0 or played == _TIMELINES.value:
      print(f"{played} timelines in {time.monotonic() - started:.0f} s: "
            + ", ".join(f"{count} {how}" for how, count in sorted(ended.items()))
            + "; nothing left behind, all time accounted for", flush=True)


if __name__ == "__main__":
  app.run(main)
