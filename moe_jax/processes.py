"""Many processes of one run: they meet, agree on what process 0 decides, and end together.

A process that raises tells the others why before it ends, and they end with that line and exit
code: none waits for it in a collective operation. One that falls silent (killed, its host lost) is
noticed by process 0 within SILENT_SECONDS, and all others end with a line that names it. Where
process 0 itself is killed, JAX ends the others at once, with a message of its own.

What is exchanged goes through the key-value store of jax.distributed, which needs no device: it
works before the first computation, and while one hangs. A process that is alone does none of this.
"""

import collections
import contextlib
import faulthandler
import itertools
import json
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax.errors import FieldError

JOIN_SECONDS = 300.0  # in which all processes must have come
BEAT_SECONDS = 2.0
SILENT_SECONDS = 30.0
_LEAVE_SECONDS = 30.0  # that process 0, on whom the store depends, stays for the others at most
_LAST_SECONDS = 1.0  # from what a process says last to its end: JAX aborts it if 0 goes before
_ENDLESS_MS = 10**9  # eleven days: the watch ends a wait for a process that has gone

_ROOM = "moe_jax"  # all keys are below it
_numbers = itertools.count()
_listeners: list[Callable[[str], None]] = []


def is_first() -> bool:
  """Whether this is process 0, which alone writes the files of a run and speaks for it."""
  return jax.process_index() == 0


def run(body: Callable[[], int], arguments: Mapping[str, Any] | None,
        ending: Callable[[BaseException], tuple[int, str] | None]) -> int:
  """Runs `body` as one of a run's processes; returns its exit code when all have ended theirs.

  A process that is alone runs `body`, and what it raises is raised. Among many an exception ends
  all of them, at once and without the exit handlers of libraries, which would wait for others.

  Args:
    body: computes on JAX's devices, which must not have been asked for before.
    arguments: for jax.distributed.initialize, of cluster.meeting; None if alone.
    ending: exit code and line of an exception that it knows; what it does not know is shown
      with its traceback and ends in 1.

  Raises:
    FieldError: nobody is to be found under these arguments.
  """
  if arguments is None or not _join(arguments):
    return body()
  watch = _Watch(jax.process_index(), jax.process_count())
  try:
    code = body()
    _store().wait_at_barrier(f"{_ROOM}/end", _ENDLESS_MS)
  except BaseException as error:
    if _is_of_jax(error):  # perhaps since another process is gone: the watch will know
      time.sleep(SILENT_SECONDS + 2 * BEAT_SECONDS)
    known = ending(error)
    if known is None:
      traceback.print_exc()
      known = 1, f"{type(error).__name__}: {error}"
    watch.end_all(*known)
  watch.stop()
  jax.distributed.shutdown()
  return code


def from_first(make: Callable[[], Any]) -> Any:
  """On every process, what `make` returns on process 0: JSON. The others wait for it.

  All processes call it in the same order.
  """
  if jax.process_count() == 1:
    return make()
  key = f"{_ROOM}/told/{next(_numbers)}"
  if is_first():
    value = make()
    _store().key_value_set(key, json.dumps(value))
    return value
  return json.loads(_store().blocking_key_value_get(key, _ENDLESS_MS))


def require_same(facts: Mapping[str, Any]) -> None:
  """Returns when every process has called it, with equal facts.

  Args:
    facts: by name, JSON.

  Raises:
    FieldError: this process's differ from those of process 0; names what differs.
  """
  mine = json.loads(json.dumps(facts))
  theirs = from_first(lambda: mine)
  differing = [f"{name} is {mine.get(name)!r} here and {theirs.get(name)!r} there"
               for name in sorted(mine.keys() | theirs.keys())
               if mine.get(name) != theirs.get(name)]
  if differing:
    raise FieldError("process_id", jax.process_index(), "differs from process 0: "
                     + "; ".join(differing[:5]))
  if jax.process_count() > 1:
    _store().wait_at_barrier(f"{_ROOM}/same/{next(_numbers)}", _ENDLESS_MS)


@contextlib.contextmanager
def told_of_the_end(listener: Callable[[str], None]) -> Iterator[None]:
  """Calls `listener` with a line if, meanwhile, another process ends this one."""
  _listeners.append(listener)
  try:
    yield
  finally:
    _listeners.remove(listener)


class StopVote:
  """Whether any process was asked to stop: all learn it at the same step.

  Every process votes once a step. Among many the votes are summed up on the devices, behind
  the step; the result is looked at one step later, when it is there without waiting.
  """

  def __init__(self, asked: list[int], mesh: Mesh):
    """`asked` gets the number of the signal when this process is asked to stop."""
    self._asked, self._alone = asked, jax.process_count() == 1
    every = Mesh(mesh.devices.reshape(-1), ("device",))
    self._spread = NamedSharding(every, P("device"))
    self._highest = jax.jit(jnp.max, out_shardings=NamedSharding(every, P()))
    self._votes: collections.deque[jax.Array] = collections.deque()

  def cast(self) -> None:
    """To be called after each step is given to the devices, on every process."""
    if self._alone:
      return
    mine = np.array(self._asked[:1] or [0], np.int32)
    votes_N = jax.make_array_from_callback((self._spread.mesh.size,), self._spread,
                                           lambda _: mine)
    self._votes.append(self._highest(votes_N))

  def result(self) -> int:
    """The signal's number; 0 to go on. To be called before each step, on every process."""
    if self._alone:
      return self._asked[0] if self._asked else 0
    return int(self._votes.popleft()) if len(self._votes) > 1 else 0


class _Watch:
  """A thread that shows that this process lives, and ends it when another has ended."""

  def __init__(self, index: int, count: int):
    self._index, self._count, self._store = index, count, _store()
    self._once = threading.Lock()  # taken by what ends this process, and never given back
    self._looked = time.monotonic()
    self._heard = dict.fromkeys(range(1, count), ("", self._looked))
    self._thread = threading.Thread(target=self._watch, daemon=True)
    self._thread.start()

  def stop(self) -> None:
    """Ends the watch on all processes. To be called when every one has ended its work."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # another was quicker
      self._store.key_value_set(f"{_ROOM}/verdict", "null")
    self._thread.join()

  def end_all(self, code: int, line: str) -> NoReturn:
    """Prints the line, and ends this and all other processes with it."""
    self._once.acquire()
    print(f"error: {line}", file=sys.stderr)
    self._pronounce(code, f"process {self._index} on {socket.gethostname()} ended: {line}")
    self._leave(code)

  def _watch(self) -> None:
    for beat in itertools.count():
      with contextlib.suppress(jax.errors.JaxRuntimeError):  # a busy store: the next may pass
        self._store.key_value_set(f"{_ROOM}/beat/{self._index}", str(beat),
                                  allow_overwrite=True)
        if self._index == 0 and (lost := self._lost()):
          self._pronounce(1, f"process {lost} has not been heard of for "
                          f"{SILENT_SECONDS:.0f} s")
      try:
        verdict = json.loads(self._store.blocking_key_value_get(
            f"{_ROOM}/verdict", int(1000 * BEAT_SECONDS)))
      except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" not in str(error):
          time.sleep(BEAT_SECONDS)
        continue
      if verdict is None:
        return
      self._once.acquire()
      line = (f"stopped, because {verdict['line']}; what was saved is kept, and the same "
              "command goes on")
      try:
        print(f"error: {line}", file=sys.stderr)
        for listener in _listeners:
          with contextlib.suppress(Exception):  # the end of a process hangs on no disk or bucket
            listener(line)
      finally:
        self._leave(verdict["code"])

  def _lost(self) -> str:
    """The processes of which nothing has been heard for too long; "" if there is none."""
    now = time.monotonic()
    beats = {int(key.rpartition("/")[2]): beat
             for key, beat in self._store.key_value_dir_get(f"{_ROOM}/beat")}
    slept = now - self._looked > SILENT_SECONDS / 2  # then the others could not be heard
    self._looked = now
    for index, (last, _) in self._heard.items():
      if slept or beats.get(index, "") != last:
        self._heard[index] = beats.get(index, ""), now
    return ", ".join(str(index) for index, (_, when) in self._heard.items()
                     if now - when > SILENT_SECONDS)

  def _pronounce(self, code: int, line: str) -> None:
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # another was quicker
      self._store.key_value_set(f"{_ROOM}/verdict", json.dumps({"code": code, "line": line}))

  def _leave(self, code: int) -> NoReturn:
    """Ends this process now; process 0 soon after the others, whom it answers, said that they go.

    That one of them has gone cannot be seen from here: one that takes longer than _LAST_SECONDS
    is aborted by JAX, and ends with SIGABRT instead of its code.
    """
    with contextlib.suppress(OSError):  # nobody reads it any more
      sys.stdout.flush()
      sys.stderr.flush()
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      self._store.key_value_set(f"{_ROOM}/left/{self._index}", "")
      until = time.monotonic() + _LEAVE_SECONDS
      while self._index == 0 and time.monotonic() < until and (
          len(self._store.key_value_dir_get(f"{_ROOM}/left")) < self._count):
        time.sleep(0.05)
    if self._index == 0:
      time.sleep(_LAST_SECONDS)
    os._exit(code)


def _join(arguments: Mapping[str, Any]) -> bool:
  """Meets the others; False if there are none. Raises FieldError."""
  address = arguments.get("coordinator_address")
  if address and arguments["process_id"] == 0:
    _require_free_port(address)
  # Where process 0 dies JAX aborts the others: without a page of what each thread was doing.
  if faulthandler.is_enabled():
    faulthandler.enable(all_threads=False)
  # JAX's own would swallow SIGTERM, on which the loop saves.
  jax.config.update("jax_enable_preemption_service", False)
  # JAX ends a process that waited in vain with an abort and a stack trace: we are quicker.
  given_up = threading.Timer(JOIN_SECONDS, _give_up, [address])
  given_up.daemon = True
  given_up.start()
  try:
    jax.distributed.initialize(**arguments, initialization_timeout=int(JOIN_SECONDS) + 60)
  except ValueError as error:
    if "coordinator_address" not in str(error):
      raise
    return False  # JAX looked for a cluster and found none
  except (RuntimeError, OSError) as error:  # requests' errors are OSErrors
    raise FieldError("num_processes", arguments.get("num_processes", ""), "the other processes "
                     "could not be found; --num_processes=1 looks for none: "
                     + re.sub(r"\s+", " ", str(error))[:300]) from None
  finally:
    given_up.cancel()
  return jax.process_count() > 1


def _give_up(address: str | None) -> None:
  where = f"at {address}" if address else "in this cluster"
  print(f"error: not all processes came together {where} within {JOIN_SECONDS:.0f} s: each "
        "needs the same --coordinator_address and --num_processes, its own --process_id, and "
        "a way through to process 0", file=sys.stderr, flush=True)
  os._exit(1)


def _require_free_port(address: str) -> None:
  """JAX would wait for the stranger who has the port."""
  port = int(address.rpartition(":")[2])
  family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
  try:
    socket.create_server(("", port), family=family, dualstack_ipv6=family
                         == socket.AF_INET6).close()
  except OSError as error:
    raise FieldError("coordinator_address", address,
                     f"its port cannot be used here: {error.strerror}") from None


def _store() -> Any:
  """The key-value store that the processes share. JAX has no public door to it; Orbax and
  others take this one."""
  from jax._src import distributed
  return distributed.global_state.client


def _is_of_jax(error: BaseException | None) -> bool:
  while error is not None:
    if isinstance(error, jax.errors.JaxRuntimeError):
      return True
    error = error.__cause__ or error.__context__
  return False
