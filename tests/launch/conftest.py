"""No launcher, agent or trainer outlives its test, however that ends."""

import contextlib
import os
import pathlib
import signal
import uuid

import pytest


@pytest.fixture(autouse=True)
def nothing_is_left_running(monkeypatch):
  mark = uuid.uuid4().hex
  monkeypatch.setenv("MOE_JAX_TEST", mark)
  yield
  for process in pathlib.Path("/proc").glob("[0-9]*"):
    with contextlib.suppress(OSError):  # it has ended meanwhile
      if f"MOE_JAX_TEST={mark}".encode() in (process / "environ").read_bytes().split(b"\0"):
        os.kill(int(process.name), signal.SIGKILL)
