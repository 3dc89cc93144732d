"""Coordinates the processes of a run: they join, follow process 0's decisions, and exit together.

A process that raises reports its error to the others before it exits, and they exit with that line
and exit code instead of waiting for it in a collective. If a process goes silent (killed, its host
lost), process 0 notices within SILENT_SECONDS, and all others exit with a line that names it. If
process 0 itself is killed, JAX ends the others at once, with a message of its own.

Communication goes through the key-value store of jax.distributed, which needs no devices: it works
before the first computation, and while one hangs. A single process does none of this.
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

JOIN_SECONDS = 300.0  # time limit for all processes to join
BEAT_SECONDS = 2.0
SILENT_SECONDS = 30.0
_LEAVE_SECONDS = 30.0  # maximum time that process 0, which hosts the store, waits for the others
_LAST_SECONDS = 1.0  # for the others to exit: JAX aborts those left when process 0 exits
_ENDLESS_MS = 10**9  # eleven days: it is the watch that ends a wait for a lost process

_ROOM = "moe_jax"  # prefix of all keys
_numbers = itertools.count()
_listeners: list[Callable[[str], None]] = []


def is_first() -> bool:
  """Whether this is process 0, which alone prints messages and writes all files but checkpoints."""
  return jax.process_index() == 0


def run(body: Callable[[], int], arguments: Mapping[str, Any] | None,
        ending: Callable[[BaseException], tuple[int, str] | None]) -> int:
  """Runs `body` as one of a run's processes; returns its exit code once all have finished.

  A single process just runs `body`, and exceptions propagate. Among several, an exception ends
  all of them, at once and without the exit handlers of libraries, which would wait for others.

  Args:
    body: computes on JAX's devices, which must not be initialized yet.
    arguments: for jax.distributed.initialize, from cluster.meeting; None for a single process.
    ending: maps a known exception to its exit code and line; an unknown one is printed with its
      traceback, and the exit code is 1.

  Raises:
    FieldError: the other processes cannot be found with these arguments.
  """
  if arguments is None or not _join(arguments):
    return body()
  watch = _Watch(jax.process_index(), jax.process_count())
  try:
    code = body()
    _store().wait_at_barrier(f"{_ROOM}/end", _ENDLESS_MS)
  except BaseException as error:
    if _is_of_jax(error):  # maybe because another process is gone: give the watch time to notice
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
  """Broadcasts what `make` returns on process 0, as JSON; the other processes wait for it.

  All processes must make these calls in the same order.
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
  """Checks that all processes call it with equal facts, and waits for them.

  Args:
    facts: JSON values by name.

  Raises:
    FieldError: the facts of this process differ from those of process 0; names which.
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
  """Within the context, calls `listener` with the reason if another process ends this one."""
  _listeners.append(listener)
  try:
    yield
  finally:
    _listeners.remove(listener)


class StopVote:
  """Whether any process was asked to stop, such that all processes stop at the same step.

  Every process votes once per step. Among several, the maximum of the votes is computed on the
  devices after the step and read one step later, when it is available without waiting.
  """

  def __init__(self, asked: list[int], mesh: Mesh):
    """`asked` receives the number of the signal that asks this process to stop."""
    self._asked, self._alone = asked, jax.process_count() == 1
    every = Mesh(mesh.devices.reshape(-1), ("device",))
    self._spread = NamedSharding(every, P("device"))
    self._highest = jax.jit(jnp.max, out_shardings=NamedSharding(every, P()))
    self._votes: collections.deque[jax.Array] = collections.deque()

  def cast(self) -> None:
    """Votes; to be called after each step is dispatched, on every process."""
    if self._alone:
      return
    mine = np.array(self._asked[:1] or [0], np.int32)
    votes_N = jax.make_array_from_callback((self._spread.mesh.size,), self._spread,
                                           lambda _: mine)
    self._votes.append(self._highest(votes_N))

  def result(self) -> int:
    """The signal's number, or 0 to continue; to be called before each step, on every process."""
    if self._alone:
      return self._asked[0] if self._asked else 0
    return int(self._votes.popleft()) if len(self._votes) > 1 else 0


class _Watch:
  """A thread that sends this process's heartbeat and ends the process if another one failed."""

  def __init__(self, index: int, count: int):
    self._index, self._count, self._store = index, count, _store()
    self._once = threading.Lock()  # acquired to end this process, and never released
    self._looked = time.monotonic()
    self._heard = dict.fromkeys(range(1, count), ("", self._looked))
    self._thread = threading.Thread(target=self._watch, daemon=True)
    self._thread.start()

  def stop(self) -> None:
    """Ends the watch on all processes; to be called once all have finished their work."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # another process was faster
      self._store.key_value_set(f"{_ROOM}/verdict", "null")
    self._thread.join()

  def end_all(self, code: int, line: str) -> NoReturn:
    """Prints the line and ends this process and all others."""
    self._once.acquire()
    print(f"error: {line}", file=sys.stderr)
    self._pronounce(code, f"process {self._index} on {socket.gethostname()} ended: {line}")
    self._leave(code)

  def _watch(self) -> None:
    for beat in itertools.count():
      with contextlib.suppress(jax.errors.JaxRuntimeError):  # the store is busy: try again later
        self._store.key_value_set(f"{_ROOM}/beat/{self._index}", str(beat),
                                  allow_overwrite=True)
        if self._index == 0 and (lost := self._lost()):
          self._pronounce(1, f"process {lost} has sent no heartbeat for "
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
      line = (f"stopped, because {verdict['line']}; checkpoints are kept; run the same "
              "command to resume")
      try:
        print(f"error: {line}", file=sys.stderr)
        for listener in _listeners:
          with contextlib.suppress(Exception):  # storage errors must not keep it from exiting
            listener(line)
      finally:
        self._leave(verdict["code"])

  def _lost(self) -> str:
    """The processes that have been silent for too long; "" if there are none."""
    now = time.monotonic()
    beats = {int(key.rpartition("/")[2]): beat
             for key, beat in self._store.key_value_dir_get(f"{_ROOM}/beat")}
    slept = now - self._looked > SILENT_SECONDS / 2  # this process was suspended and heard nobody
    self._looked = now
    for index, (last, _) in self._heard.items():
      if slept or beats.get(index, "") != last:
        self._heard[index] = beats.get(index, ""), now
    return ", ".join(str(index) for index, (_, when) in self._heard.items()
                     if now - when > SILENT_SECONDS)

  def _pronounce(self, code: int, line: str) -> None:
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # another process was faster
      self._store.key_value_set(f"{_ROOM}/verdict", json.dumps({"code": code, "line": line}))

  def _leave(self, code: int) -> NoReturn:
    """Exits now; process 0, which hosts the store, waits for the others to announce their exit.

    Whether they have exited is not visible from here: one that takes longer than _LAST_SECONDS
    is aborted by JAX, and ends with SIGABRT instead of its exit code.
    """
    with contextlib.suppress(OSError):  # the output is closed
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
  """Joins the other processes; returns False if there are none. Raises FieldError."""
  address = arguments.get("coordinator_address")
  if address and arguments["process_id"] == 0:
    _require_free_port(address)
  # If process 0 dies, JAX aborts the others: do not dump the stacks of all threads then.
  if faulthandler.is_enabled():
    faulthandler.enable(all_threads=False)
  # JAX's preemption service would swallow SIGTERM, on which the loop saves.
  jax.config.update("jax_enable_preemption_service", False)
  # On a timeout JAX aborts with a stack trace: exit with one line before that.
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
  print(f"error: not all processes connected {where} within {JOIN_SECONDS:.0f} s: each "
        "needs the same --coordinator_address and --num_processes, its own --process_id, and "
        "network access to process 0", file=sys.stderr, flush=True)
  os._exit(1)


def _require_free_port(address: str) -> None:
  """Raises FieldError if another program has the port, for which JAX would wait."""
  port = int(address.rpartition(":")[2])
  family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
  try:
    socket.create_server(("", port), family=family, dualstack_ipv6=family
                         == socket.AF_INET6).close()
  except OSError as error:
    raise FieldError("coordinator_address", address,
                     f"its port cannot be used here: {error.strerror}") from None


def _store() -> Any:
  """The key-value store that the processes share.

  JAX has no public API for it; Orbax and others use this private one, too.
  """
  from jax._src import distributed
  return distributed.global_state.client


def _is_of_jax(error: BaseException | None) -> bool:
  while error is not None:
    if isinstance(error, jax.errors.JaxRuntimeError):
      return True
    error = error.__cause__ or error.__context__
  return False
