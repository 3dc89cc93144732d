"""The run directory `<out>/<experiment>/<cell>/`, and all its file names. No JAX.

    config.json                       written before the first step
    status.json                       from the trainer: state, step, heartbeat, error
    metrics/<attempt>-<first step>.jsonl   one file per attempt and checkpoint interval
    checkpoints/<step>/               Orbax; checksums/<step>.json has a hash of each file
    eval/NAME.json                    evaluations of the newest checkpoint
    eval/NAME.npz                     their measurements per document
    eval/steps/<step>/NAME.json       evaluations of any checkpoint
    launch.json, log.txt              from the launcher
    tensorboard/, profile/            for TensorBoard; profile/ on request

It may be on an object store (files.py), so each file has one writer and is written as a whole.
`<out>/<experiment>/results.csv` is derived from these files.
"""

import contextlib
import dataclasses
import fcntl
import importlib.util
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from moe_jax import config as config_lib
from moe_jax.config import RunConfig
from moe_jax.errors import DamagedFile, FieldError
from moe_jax.files import is_local, read_json, write_json
from moe_jax.grid import Cell

_LONGEST_PART = 255  # bytes in one component of a path

HEARTBEAT_SECONDS = 10.0
DEAD_AFTER_SECONDS = 120.0

RUNNING, FINISHED, PREEMPTED = "running", "finished", "preempted"
DIVERGED, FAILED = "diverged", "failed"

# Exit codes of the trainer, for launchers; 0: finished, cli.EXIT_BAD_INPUT: nothing was trained.
EXIT_PREEMPTED = 75  # stopped by a signal after saving a checkpoint: run again to resume
EXIT_DIVERGED = 76  # the loss is not finite: a retry would diverge again
EXIT_BUSY = 77  # another process holds the run directory


class RunDirBusy(RuntimeError):
  """Another process is using the run directory."""


def is_gone(host: str, pid: int) -> bool:
  """Whether a process has certainly ended; False if it cannot be checked from this host."""
  if host != socket.gethostname():
    return False
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return True
  except PermissionError:  # it exists and belongs to another user
    pass
  return False


def _require_directory(root: epath.Path) -> None:
  """Raises FieldError unless `root` is a directory or can be created."""
  nearest = next(path for path in (root, *root.absolute().parents) if os.path.lexists(path))
  if not nearest.is_dir():
    kind = "a file" if nearest.exists() else "a broken link"
    what = f"is {kind}" if nearest == root else f"lies below {nearest}, {kind}"
    raise FieldError("out", os.fspath(root), f"{what}; it must be a directory")


@dataclasses.dataclass(frozen=True)
class RunDir:
  """The files of one run."""

  path: epath.Path

  @classmethod
  def of(cls, out: str | os.PathLike, cell: Cell) -> "RunDir":
    """The directory of a cell under the root `out`. Raises FieldError if `out` is unusable."""
    if os.fspath(out).startswith("gs://") and importlib.util.find_spec("gcsfs") is None:
      raise FieldError("out", os.fspath(out), "needs gcsfs: pip install 'moe_jax[gcs]'")
    if not os.fspath(out):
      raise FieldError("out", "", "must name a directory")
    if "://" in os.fspath(out) and not os.fspath(out).startswith("gs://"):
      raise FieldError("out", os.fspath(out), "must be a directory of this machine or "
                       "gs://BUCKET/PATH")
    root, path = epath.Path(out), epath.Path(out) / cell.experiment / cell.name
    if is_local(root):
      _require_directory(root)
      long = next((part for part in path.parts if len(os.fsencode(part)) > _LONGEST_PART), "")
      if long:
        raise FieldError("out", str(path), f"has a name of {len(os.fsencode(long))} bytes; at "
                         f"most {_LONGEST_PART} are allowed: move settings that all cells share "
                         "into the recipe of the experiment file, which names omit")
    return cls(path)

  @classmethod
  def named(cls, out: str | os.PathLike, run: str) -> "RunDir":
    """The directory of `run`, which is EXPERIMENT/CELL under the root `out`, or a path."""
    is_path = run.startswith(("/", "./", "../")) or run.count("/") > 1
    return cls(epath.Path(run) if is_path else epath.Path(out) / run)

  def trunk(self, config: RunConfig) -> "RunDir | None":
    """The directory of the run that this one branches from; None if it is not a branch.

    `config` is this run's configuration.
    """
    run = config.train.branch_run
    if run is None:
      return None
    root, experiment = self.path.parent.parent, self.path.parent.name
    return RunDir.named(root, run if "/" in run else f"{experiment}/{run}")

  def source(self, config: RunConfig) -> "RunDir | None":
    """The directory of the run that this one is initialized from; None if from scratch.

    `config` is this run's configuration.
    """
    run = config.train.init_run
    return None if run is None else RunDir.named(self.path.parent.parent, run)

  @property
  def checkpoints(self) -> epath.Path:
    return self.path / "checkpoints"

  @property
  def tensorboard(self) -> epath.Path:
    return self.path / "tensorboard"

  @property
  def launch(self) -> epath.Path:
    return self.path / "launch.json"

  @property
  def log(self) -> epath.Path:
    return self.path / "log.txt"

  @property
  def profile(self) -> epath.Path:
    return self.path / "profile"

  def checksums(self, step: int) -> epath.Path:
    return self.path / "checksums" / f"{step}.json"

  def has_checkpoint(self, step: int | None = None) -> bool:
    """Whether there is a finished checkpoint, of `step` if given. It may be damaged."""
    return any(True for _ in self._saved("[0-9]*" if step is None else str(step)))

  def saved_step(self) -> int:
    """The step of the newest finished checkpoint, or 0. It may be damaged."""
    return max(self._saved("[0-9]*"), default=0)

  def _saved(self, steps: str) -> Iterator[int]:
    if is_local(self.path):
      names = (file.name for file in self.checkpoints.glob(steps))
    else:
      # On an object store a step's folder appears with its first file; Orbax writes this one last.
      names = (file.parent.name for file in self.checkpoints.glob(f"{steps}/commit_success.txt"))
    return (int(name) for name in names if name.isdecimal())

  # config.json

  def check_identity(self, cell: Cell) -> bool:
    """Returns whether the run has begun; writes nothing.

    Raises:
      FieldError: the directory belongs to a run of another identity; names the fields.
    """
    theirs = self.read_config()
    if theirs is not None:
      differing = config_lib.identity_difference(cell.config, theirs)
      if differing:
        raise FieldError("out", str(self.path), "holds a run of another identity: "
                         + "; ".join(differing))
    return theirs is not None

  def check_source(self, config: RunConfig) -> None:
    """Checks that a run which has begun was initialized from the run that `init_from` now names.

    The identity contains only the name of that run, and runs under different roots may share it.

    Raises:
      FieldError: it was initialized from another run's parameters.
    """
    there = self.source(config)
    if there is None or (began := self.read_began_from()) is None:
      return
    with contextlib.suppress(DamagedFile):
      source = there.read_config()
      if source is not None and began["identity"] not in (
          config_lib.identity_hash(source), there.read_identity()):
        raise FieldError("config.train.init_from", config.train.init_from, f"{self.path} began "
                         f"from another run of that name, of identity {began['identity']}: give "
                         "that run's path, or another --out")

  def claim(self, cell: Cell, branched_from: Mapping[str, Any] | None = None,
            began_from: Mapping[str, Any] | None = None) -> None:
    """Writes config.json, or checks that an existing one has the same identity.

    Args:
      cell: the cell to train here.
      branched_from: for a branch without checkpoints of its own: `run`, `identity` and `step`
        of the trunk's checkpoint.
      began_from: for a run without checkpoints that is initialized from another run: `run`,
        `identity` and `step` of that checkpoint, and `checkpoint`, a hash of its content.

    Raises:
      FieldError: the directory belongs to a run of another identity; names the fields.
    """
    self.check_source(cell.config)
    if (self.check_identity(cell) and branched_from in (None, self.read_branched_from())
        and began_from in (None, self.read_began_from())):
      return
    write_json(self.path / "config.json", {
        "experiment": cell.experiment, "cell": cell.name,
        "identity": config_lib.identity_hash(cell.config),
        "branched_from": branched_from, "began_from": began_from,
        "config": config_lib.to_dict(cell.config)})

  def read_branched_from(self) -> dict[str, Any] | None:
    """`run`, `identity` and `step` of the trunk's checkpoint that a branch started from."""
    return (self._stored() or {}).get("branched_from")

  def read_began_from(self) -> dict[str, Any] | None:
    """`run`, `identity`, `step` and `checkpoint` of the parameters a run was initialized from."""
    return (self._stored() or {}).get("began_from")

  def read_identity(self) -> str | None:
    """The stored hash of the identity that the run began with, or None."""
    return (self._stored() or {}).get("identity")

  def read_config(self) -> RunConfig | None:
    """The configuration the run began with, or None before it began."""
    stored = self._stored()
    if stored is None:
      return None
    try:
      return config_lib.config_from_dict(stored["config"])
    except (FieldError, KeyError, TypeError) as error:
      raise DamagedFile("out", str(self.path / "config.json"),
                        f"is not a run configuration: {error}") from None

  def _stored(self) -> dict[str, Any] | None:
    """The content of config.json, or None before the run began. Raises DamagedFile."""
    path = self.path / "config.json"
    stored = read_json(path)
    if not isinstance(stored, dict | None):
      raise DamagedFile("out", str(path), f"is not a run configuration: {type(stored).__name__}")
    return stored

  # status.json

  def read_status(self) -> dict[str, Any]:
    """The status last written by the trainer, or {} if there is none. Raises DamagedFile."""
    path = self.path / "status.json"
    status = read_json(path)
    if status is None:
      return {}
    kinds = {"state": str, "host": str, "pid": int, "heartbeat": (int, float)}
    if (not isinstance(status, dict)
        or not all(isinstance(status.get(name), kind) for name, kind in kinds.items())
        or not 0 < status["pid"] < 2**31):
      raise DamagedFile("out", str(path), "is damaged: no state, host, pid or heartbeat")
    return status

  def write_status(self, status: Mapping[str, Any]) -> None:
    write_json(self.path / "status.json", {
        **status, "host": socket.gethostname(), "pid": os.getpid(),
        "heartbeat": time.time()})

  def is_alive(self, status: Mapping[str, Any]) -> bool:
    """Whether the process that wrote this status is still working on the run.

    Its heartbeat must be recent; on this host, its process must exist too. A process that exists
    but is silent (a long compilation) counts as alive if the directory is locked. The lock is
    tried only in that case, since inspecting a run must not block one that is starting.
    """
    if status.get("state") != RUNNING or is_gone(status["host"], status["pid"]):
      return False
    if time.time() - status["heartbeat"] < DEAD_AFTER_SECONDS:
      return True
    return (is_local(self.path) and status["host"] == socket.gethostname()
            and self._is_locked())

  def _is_locked(self) -> bool:
    try:
      with open(self.path / "lock") as file:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
      return True
    except FileNotFoundError:
      return False
    return False

  @contextlib.contextmanager
  def lock(self) -> Iterator[None]:
    """Locks the directory for this process within the context.

    On a file system the kernel releases the lock when the process ends, however it ends. An
    object store has no locks: there a heartbeat from another process that is younger than
    DEAD_AFTER_SECONDS counts as a lock.

    Raises:
      RunDirBusy: another process holds the lock; names it.
    """
    if not is_local(self.path):
      status = self.read_status()
      ours = (status.get("host"), status.get("pid")) == (socket.gethostname(), os.getpid())
      if self.is_alive(status) and not ours:
        raise RunDirBusy(f"{self.path} is in use by process {status['pid']} on "
                         f"{status['host']}: wait for it, or stop it first")
      yield
      return
    self.path.mkdir(parents=True, exist_ok=True)
    with open(self.path / "lock", "a+") as file:
      try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        file.seek(0)
        raise RunDirBusy(f"{self.path} is in use by {file.read() or 'another process'}: "
                         "wait for it, or stop it first") from None
      file.truncate(0)
      file.write(f"process {os.getpid()} on {socket.gethostname()}")
      file.flush()
      yield

  # metrics/

  def metrics_file(self, attempt: int, first_step: int) -> epath.Path:
    return self.path / "metrics" / f"{attempt:04d}-{first_step:08d}.jsonl"

  def next_attempt(self) -> int:
    """One more than the highest attempt with metrics."""
    names = [file.name for file in self._metrics_files()]
    return 1 + max((int(name.partition("-")[0]) for name in names), default=0)

  def read_metrics(self) -> list[dict[str, Any]]:
    """The records of all attempts, sorted by step; for duplicate steps the later attempt wins."""
    by_step = {}
    for file in self._metrics_files():
      for number, line in enumerate(file.read_text().splitlines(), start=1):
        try:
          record = json.loads(line)
          by_step[record["step"]] = record
        except (json.JSONDecodeError, KeyError, TypeError) as error:
          raise DamagedFile("out", f"{file}:{number}",
                            f"is damaged, not a record of metrics: {error}") from None
    return [by_step[step] for step in sorted(by_step)]

  def _metrics_files(self) -> list[epath.Path]:
    return sorted((self.path / "metrics").glob("[0-9]*.jsonl"), key=lambda f: f.name)

  # eval/

  def write_eval(self, name: str, result: Mapping[str, Any], step: int | None = None) -> None:
    """Writes an evaluation of the newest checkpoint, or of the one at `step`."""
    write_json(self._evals(step) / f"{name}.json", dict(result))

  def read_eval(self, name: str, step: int | None = None) -> Any:
    """Reads what write_eval wrote, or None. Raises DamagedFile."""
    return read_json(self._evals(step) / f"{name}.json")

  def read_evals(self) -> dict[str, dict[str, Any]]:
    files = sorted(self._evals(None).glob("*.json"), key=lambda f: f.name)
    return {file.stem: read_json(file) for file in files}

  def evaluated_steps(self) -> list[int]:
    """Steps with evaluations under eval/steps, ascending; may lack the newest checkpoint's."""
    return sorted(int(folder.name) for folder in (self.path / "eval" / "steps").glob("[0-9]*"))

  def documents(self, name: str) -> epath.Path:
    """The file of an evaluation's measurements per document."""
    return self._evals(None) / f"{name}.npz"

  def _evals(self, step: int | None) -> epath.Path:
    return self.path / "eval" if step is None else self.path / "eval" / "steps" / str(step)
