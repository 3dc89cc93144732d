"""What a preparation says of how far it is, and that its processes end with it."""

import io
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
import rich.console

from moe_jax.data import cache, pool
from moe_jax.data.progress import Progress
from moe_jax.errors import FieldError


class Clock:
  now = 0.0

  def __call__(self):
    return self.now


def show(times, terminal=False):
  """What is printed when a tenth of 50 MB is done at each of these seconds."""
  clock, out = Clock(), io.StringIO()
  console = rich.console.Console(file=out, force_terminal=terminal, width=100)
  with Progress("mine: reading", 50_000_000, console, clock) as progress:
    for clock.now in times:
      progress.advance(5_000_000)
  return out.getvalue()


def test_on_a_pipe_a_line_now_and_then_and_at_the_end():
  assert show([1, 5, 11, 12, 13, 20, 22, 23, 24, 25]).splitlines() == [
      "mine: reading: 15 of 50 MB, 1.4 MB/s, 26 s left",
      "mine: reading: 35 of 50 MB, 1.6 MB/s, 9 s left",
      "mine: reading: 50 of 50 MB, 2.0 MB/s"]
  assert show([1] * 10) == ""  # what is done at once says nothing


def test_on_a_terminal_a_bar():
  drawn = show([1, 2, 3], terminal=True)
  assert "mine: reading" in drawn
  assert "15.0/50.0 MB" in drawn.rpartition("mine: reading")[2]


def write(file, fail=False):
  if fail:
    raise FieldError("from", file.name, "is no text")
  cache.write_whole(file, lambda opened: opened.write(str(os.getpid()).encode()))


def kill(file):
  os.kill(os.getpid(), signal.SIGKILL)


def jobs(folder, *arguments, count=6):
  return [pool.Job(folder / str(number), 10, (folder / str(number), *arguments))
          for number in range(count)]


def test_work_is_spread_and_what_is_done_is_left(tmp_path, monkeypatch):
  monkeypatch.setattr(pool, "_ALONE_BYTES", 0)
  (tmp_path / "3").write_text("before")
  pool.run("x", write, jobs(tmp_path), 2)
  found = {file.name: file.read_text() for file in tmp_path.iterdir()}
  assert found.pop("3") == "before"
  assert len(found) == 5
  assert str(os.getpid()) not in found.values()


def test_an_error_of_a_worker_is_the_error(tmp_path, monkeypatch):
  monkeypatch.setattr(pool, "_ALONE_BYTES", 0)
  with pytest.raises(FieldError, match="from='.': is no text"):
    pool.run("x", write, jobs(tmp_path, True), 2)
  with pytest.raises(FieldError, match="processes=2: one of them was killed"):
    pool.run("x", kill, jobs(tmp_path), 2)


PARENT = """
import pathlib, sys, time
from moe_jax.data import pool

def work(file):
  file.write_text(str(__import__("os").getpid()))
  time.sleep(600)

if __name__ == "__main__":
  pool._ALONE_BYTES = 0
  folder = pathlib.Path(sys.argv[1])
  pool.run("x", work, [pool.Job(folder / f"no{n}", 1, (folder / f"pid{n}",)) for n in (0, 1)], 2)
"""


def test_workers_end_when_their_parent_is_killed(tmp_path):
  (tmp_path / "parent.py").write_text(PARENT)
  environment = dict(os.environ, PYTHONPATH=str(pathlib.Path(pool.__file__).parents[2]))
  parent = subprocess.Popen([sys.executable, str(tmp_path / "parent.py"), str(tmp_path)],
                            env=environment)
  files = [tmp_path / "pid0", tmp_path / "pid1"]
  while not all(file.exists() and file.read_text() for file in files):
    assert parent.poll() is None
    time.sleep(0.05)
  parent.kill()
  parent.wait()
  for pid in [int(file.read_text()) for file in files]:
    deadline = time.monotonic() + 60
    while pathlib.Path(f"/proc/{pid}").exists() and not _is_zombie(pid):
      assert time.monotonic() < deadline, "a worker outlived its parent"
      time.sleep(0.05)


def _is_zombie(pid):
  try:
    return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
  except FileNotFoundError:
    return True
