"""Ensures one driver at a time: a lease with generations that only needs create-if-absent.

`<folder>/driver-00000007.json` is the seventh lease. To drive, a process creates the next number,
which both a file system and an object store allow only one process to do; only its creator
rewrites it, to renew it. A holder that finds a higher number has lost the lease for good.
Before any action that costs money, the lease must hold for longer than the action can take.
"""

import contextlib
import dataclasses
import json
import os
import socket
import tempfile
import time
from collections.abc import Callable
from typing import Any

from etils import epath

from moe_jax.errors import DamagedFile
from moe_jax.files import is_local, read_json, write_json
from moe_jax.run_dir import is_gone

SECONDS = 300.0  # for which a lease holds after its last renewal
_SKEW = 60.0  # upper bound on the difference between two machines' clocks


class Held(RuntimeError):
  """Another driver is at work."""


class Lost(RuntimeError):
  """This driver was presumed dead, and another is at work."""


def create(path: epath.Path, text: str) -> bool:
  """Creates a file atomically unless it exists. Returns whether this call created it."""
  path.parent.mkdir(parents=True, exist_ok=True)
  if not is_local(path):
    import gcsfs  # from the extra [gcs]; slow to import
    try:
      gcsfs.GCSFileSystem().pipe_file(os.fspath(path), text.encode(), mode="create")
    except FileExistsError:  # it is ours if a first request's answer was lost
      return path.read_text() == text
    return True
  with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".lease-") as partial:
    partial.write(text)
    partial.flush()
    try:
      os.link(partial.name, path)
    except FileExistsError:
      return False
  return True


@dataclasses.dataclass
class Lease:
  """A lease that this process acquired.

  Attributes:
    folder: where leases are kept.
    generation: its number.
    written: when it was last written, by `clock`.
  """

  folder: epath.Path
  generation: int
  written: float
  clock: Callable[[], float]

  def renew(self) -> None:
    """Renews the lease. Raises Lost."""
    self._require_newest()
    self.written = self.clock()
    write_json(_file(self.folder, self.generation), _word(self.written))

  def require(self, seconds: float) -> None:
    """Raises Lost unless the lease holds for `seconds` more; renews it if necessary."""
    if self.clock() + seconds > self.written + SECONDS:
      self.renew()
    else:
      self._require_newest()

  def release(self) -> None:
    """Lets the next driver begin at once."""
    with contextlib.suppress(Exception):  # best-effort: it expires anyway; errors differ by storage
      if _newest(self.folder) == self.generation:
        write_json(_file(self.folder, self.generation), _word(0.0))

  def _require_newest(self) -> None:
    newest = _newest(self.folder)
    if newest != self.generation:
      raise Lost(f"another driver took over (lease {newest}, this one had {self.generation})")


def acquire(folder: epath.Path, clock: Callable[[], float] = time.time) -> Lease:
  """Acquires the next lease. Raises Held, which names the holder, while another one holds."""
  newest = _newest(folder)
  if newest:
    word = _read(_file(folder, newest))
    if clock() < word["written"] + SECONDS + _SKEW and not is_gone(word["host"], word["pid"]):
      raise Held(f"process {word['pid']} on {word['host']} drives this experiment (lease last "
                 f"renewed {max(0, clock() - word['written']):.0f} s ago)")
  written = clock()
  if not create(_file(folder, newest + 1), json.dumps(_word(written))):
    raise Held("another driver started at the same moment")
  for number in range(max(1, newest - 8), newest):  # remove old leases, but never the newest
    _file(folder, number).unlink(missing_ok=True)
  return Lease(folder, newest + 1, written, clock)


def _word(written: float) -> dict[str, object]:
  return {"host": socket.gethostname(), "pid": os.getpid(), "written": written}


def _read(file: epath.Path) -> dict[str, Any]:
  """Reads what `_word` returned when it was written. Raises DamagedFile."""
  word = read_json(file)
  kinds = {"host": str, "pid": int, "written": (int, float)}
  if not isinstance(word, dict) or not all(
      isinstance(word.get(name), kind) for name, kind in kinds.items()):
    raise DamagedFile("out", os.fspath(file), "is damaged: host, pid or written is missing or "
                      "invalid; if no launcher drives this experiment, delete the file")
  return word


def _file(folder: epath.Path, generation: int) -> epath.Path:
  return folder / f"driver-{generation:08d}.json"


def _newest(folder: epath.Path) -> int:
  numbers = [file.stem.removeprefix("driver-") for file in folder.glob("driver-*.json")]
  return max((int(number) for number in numbers if number.isdecimal()), default=0)
