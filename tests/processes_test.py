"""What processes tell one another, without a device: each test runs real ones."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from moe_jax import processes
from moe_jax.errors import FieldError
from tests.experiment_files import ROOT

# Beats are quick here, so that silence is noticed in three seconds and not in thirty.
SCRIPT = """
import os, pathlib, sys, time
from moe_jax import processes
from moe_jax.errors import FieldError
processes.BEAT_SECONDS, processes.SILENT_SECONDS = 0.2, 3.0
processes.JOIN_SECONDS = float(os.environ.get("JOIN_SECONDS", 60))
address, n, me = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])

def wait():
  print("waiting", flush=True)
  time.sleep(600)

def ending(error):
  return (2, str(error)) if isinstance(error, FieldError) else None

def body():
  {body}
  return 0

sys.exit(processes.run(body, dict(coordinator_address=address, num_processes=n, process_id=me,
                                  cluster_detection_method="deactivate"), ending))
"""


def free_address():
  with socket.create_server(("localhost", 0)) as free:
    return f"localhost:{free.getsockname()[1]}"


def start(body, n, address=None, only=None, **environment):
  address = address or free_address()
  return [subprocess.Popen(
      [sys.executable, "-c", SCRIPT.replace("{body}", body.replace("\n", "\n  ")), address,
       str(n), str(i)], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
      env=os.environ | {"XLA_FLAGS": "", **environment}) for i in range(n)
      if only in (None, i)]


def ended(started):
  words = [process.communicate() for process in started]
  return [(process.returncode, *said) for process, said in zip(started, words, strict=True)]


def until_waiting(started):
  for process in started:
    assert process.stdout.readline() == "waiting\n", process.communicate()


def test_a_process_alone_asks_nobody():
  assert processes.run(lambda: 3, None, lambda error: None) == 3
  assert processes.from_first(lambda: {"a": 1}) == {"a": 1}
  processes.require_same({"a": object.__name__})
  with pytest.raises(FieldError):  # is raised as it is
    processes.run(lambda: (_ for _ in ()).throw(FieldError("a", 1, "b")), None,
                  lambda error: (5, ""))


def test_all_get_what_process_0_has_and_end_together():
  done = ended(start("""
if me == 0: time.sleep(0.5)
print(processes.from_first(lambda: [me, "told"]), processes.from_first(lambda: me))
processes.require_same({"a": 1, "b": (1, 2)})
if me == 1: time.sleep(0.5)""", 3))
  assert [(code, out) for code, out, _ in done] == [(0, "[0, 'told'] 0\n")] * 3, done


def test_what_differs_is_named_and_nobody_goes_on():
  done = ended(start('processes.require_same({"a": 1, "b": me // 2}); print("on")', 3))
  assert [(code, out) for code, out, _ in done] == [(2, "")] * 3
  line = "process_id=2: differs from process 0: b is 1 here and 0 there"
  assert f"error: {line}\n" in done[2][2]
  for i in (0, 1):
    assert "stopped, because process 2 on" in done[i][2] and f"ended: {line}" in done[i][2]


@pytest.mark.parametrize("who", [0, 1])
def test_an_error_on_one_ends_all_with_its_line_and_code(who):
  done = ended(start(f"""
with processes.told_of_the_end(lambda line: print("told:", line, flush=True)):
  processes.require_same({{}})  # all listen by then
  if me == {who}: raise FieldError("x", 1, "is bad")
  wait()""", 2))
  assert [code for code, _, _ in done] == [2, 2]
  assert done[who][2].endswith("error: x=1: is bad\n") and "told" not in done[who][1]
  said = f"stopped, because process {who} on {socket.gethostname()} ended: x=1: is bad; "
  assert "error: " + said in done[1 - who][2] and "told: " + said in done[1 - who][1]


def test_a_listener_that_fails_keeps_nobody_from_ending():
  """What a bucket raises is no OSError: the main thread would wait for a watch that is gone."""
  done = ended(start("""
import threading
class HttpError(Exception): pass
def listener(line): raise HttpError("out of reach")
threading.Timer(20, os._exit, [9]).start()
with processes.told_of_the_end(listener):
  if me == 1: raise FieldError("x", 1, "is bad")
  wait()""", 2))
  assert [code for code, _, _ in done] == [2, 2]
  assert "ended: x=1: is bad; " in done[0][2] and "HttpError" not in done[0][2]


def test_one_that_is_slow_to_go_ends_with_its_code():
  done = ended(start("""
leave = os._exit
os._exit = lambda code: (time.sleep(0.3 * me), leave(code))
if me == 1: raise FieldError("x", 1, "is bad")
wait()""", 2))
  assert [code for code, _, _ in done] == [2, 2]


def test_an_error_that_nobody_foresaw_is_shown_in_full():
  done = ended(start("[][me + 1] if me else wait()", 2))
  assert [code for code, _, _ in done] == [1, 1]
  assert "Traceback" in done[1][2] and "error: IndexError: list index out of range" in done[1][2]
  assert "ended: IndexError" in done[0][2] and "Traceback" not in done[0][2]


@pytest.mark.parametrize("number", [
    signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)])
def test_a_process_that_falls_silent_ends_the_others(number):
  started = start("wait()", 3)
  until_waiting(started)
  started[1].send_signal(number)
  done = ended([started[0], started[2]])
  started[1].kill()
  ended([started[1]])
  for code, _, err in done:
    assert code == 1 and "stopped, because process 1 has sent no heartbeat for 3 s" in err


def test_without_process_0_the_others_end_at_once():
  started = start("wait()", 2)
  until_waiting(started)
  started[0].kill()
  done = ended(started)
  assert done[1][0] == -signal.SIGABRT
  assert "another task died" in done[1][2]


def test_a_process_for_whom_none_comes_says_so():
  ((code, _, err),) = ended(start("", 2, only=1, JOIN_SECONDS="2"))
  assert code == 1
  assert "error: not all processes connected at localhost:" in err and "within 2 s" in err


def test_a_port_that_is_taken_is_refused():
  with socket.create_server(("localhost", 0)) as taken:
    address = f"localhost:{taken.getsockname()[1]}"
    ((code, _, err),) = ended(start("", 2, address, only=0))
  assert code == 1 and f"FieldError: coordinator_address='{address}': its port" in err


@pytest.mark.slow
def test_after_a_pause_the_others_are_given_time_to_be_heard():
  """A process 0 that was stopped has heard nobody, and must not conclude that they are lost."""
  started = start("print('waiting', flush=True); time.sleep(8)", 2)
  until_waiting(started)
  started[0].send_signal(signal.SIGSTOP)
  time.sleep(4)
  started[0].send_signal(signal.SIGCONT)
  assert [code for code, _, _ in ended(started)] == [0, 0]
