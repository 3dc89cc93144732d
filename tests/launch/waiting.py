"""Waiting for what other processes do."""

import time


def wait_until(condition, patience, pause=0.02):
  """Returns when the condition holds; fails if it does not within `patience` seconds."""
  deadline = time.monotonic() + patience
  while not condition():
    assert time.monotonic() < deadline, "it did not happen"
    time.sleep(pause)
