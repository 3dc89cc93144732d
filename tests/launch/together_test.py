"""Several processes of one trainer on this machine, which end together."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from launch import together
from tests.experiment_files import ROOT

PATIENCE = 60  # seconds a loaded machine may take for what takes one
# A trainer that says who it is, then does what its number is told to do.
TRAINER = """
import os, pathlib, signal, sys, time
flags = dict(flag[2:].split("=") for flag in sys.argv[2:])
me, folder = int(flags["process_id"]), pathlib.Path(sys.argv[1])
signal.signal(signal.SIGTERM, lambda *_: os._exit(75))
(folder / f"{me}.new").write_text(f"{os.getpid()} {flags['coordinator_address']}")
(folder / f"{me}.new").rename(folder / str(me))
while not (folder / f"end{me}").exists():
  time.sleep(0.01)
sys.exit(int((folder / f"end{me}").read_text()))
"""


@pytest.fixture
def three(tmp_path):
  """A started launch of three, and their process ids and addresses."""
  process = subprocess.Popen(
      [*together.command(3, [sys.executable, "-c", TRAINER, str(tmp_path)])], cwd=ROOT,
      text=True, stderr=subprocess.PIPE)
  deadline = time.monotonic() + PATIENCE
  while not all((tmp_path / str(i)).exists() for i in range(3)):
    assert process.poll() is None and time.monotonic() < deadline
    time.sleep(0.01)
  yield process, [(tmp_path / str(i)).read_text().split() for i in range(3)]
  process.kill()
  process.wait(PATIENCE)
  process.stderr.close()


def end(folder: pathlib.Path, i: int, code: int) -> None:
  (folder / f"end{i}.new").write_text(str(code))
  (folder / f"end{i}.new").rename(folder / f"end{i}")


def gone(pid: str) -> bool:
  try:
    os.kill(int(pid), 0)
  except ProcessLookupError:
    return True
  return False


def test_one_process_is_the_trainer_itself():
  assert together.command(1, ["train", "--x"]) == ("train", "--x")


def test_all_get_one_address_and_end_well(three, tmp_path):
  process, told = three
  assert len({address for _, address in told}) == 1
  for i in range(3):
    end(tmp_path, i, 0)
  assert process.wait(PATIENCE) == 0


def test_where_one_is_killed_the_others_are_ended(three):
  process, told = three
  os.kill(int(told[1][0]), signal.SIGKILL)
  _, err = process.communicate(timeout=PATIENCE)
  assert process.returncode == 137
  assert err == "error: process 1 of 3 was killed by SIGKILL; the others were killed\n"
  assert all(gone(pid) for pid, _ in told)


def test_where_one_fails_the_others_may_end_by_themselves(three, tmp_path):
  process, told = three
  end(tmp_path, 2, 2)
  time.sleep(0.3)
  assert not gone(told[0][0])
  end(tmp_path, 0, 1)
  end(tmp_path, 1, 1)
  assert process.wait(PATIENCE) == 2
  assert process.stderr.read() == ""


def test_a_signal_is_passed_on_to_all(three):
  process, told = three
  process.terminate()
  assert process.wait(PATIENCE) == 75
  assert all(gone(pid) for pid, _ in told)


@pytest.mark.parametrize("arguments", [[], ["3"], ["x", "true"], ["0", "true"]])
def test_bad_input_is_one_line(arguments):
  done = subprocess.run([sys.executable, "-m", "launch.together", *arguments], cwd=ROOT,
                        text=True, capture_output=True, timeout=PATIENCE)
  assert done.returncode == 2
  assert done.stderr == "error: usage: python -m launch.together N COMMAND...\n"
