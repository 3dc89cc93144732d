"""Defines jobs: a cell, its run directory, the command that trains it, and launch.json."""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Mapping, Sequence

from etils import epath

from launch import ends
from moe_jax import branch
from moe_jax.data.corpus import CARD, CORPORA
from moe_jax.errors import DamagedFile, FieldError, require
from moe_jax.files import reaching, read_as, write_json
from moe_jax.grid import Cell
from moe_jax.population import deal
from moe_jax.run_dir import RunDir

# States that a launcher gives a cell where none of the trainer's own fits.
STARTING = "starting"  # launched, not ended; the trainer may not have written its status yet
REFUSED = "refused"  # the trainer rejected its input
BUSY = "busy"  # another process holds the run directory
STOPPED = "stopped"  # told to stop, and ended before it had saved


@dataclasses.dataclass(frozen=True)
class Launch:
  """The launcher's latest record of a run, stored in launch.json.

  Attributes:
    backend: name of the backend.
    command: the trainer's command line.
    attempt: how many times the run has been launched.
    host, pid: the trainer's process.
    started, ended: seconds since the epoch; `ended` is None while it runs.
    state: `starting` until it ends, then how it ended.
    exit_code: the trainer's; a negative one is the signal that killed it.
    error: why it did not finish, in one line.
    failures: attempts that the program itself failed since the run last saved a new checkpoint,
      where a budget limits them.
    saved: the newest checkpoint's step when the attempt began.
  """

  backend: str
  command: tuple[str, ...]
  attempt: int
  host: str
  pid: int
  started: float
  ended: float | None = None
  state: str = STARTING
  exit_code: int | None = None
  error: str | None = None
  failures: int = 0
  saved: int = 0


def read_launch(run_dir: RunDir) -> Launch | None:
  """Reads launch.json; None if the run was never launched. Raises FieldError if it is damaged."""
  return read_as(Launch, run_dir.launch)


def write_launch(run_dir: RunDir, launch: Launch) -> None:
  write_json(run_dir.launch, dataclasses.asdict(launch))


@dataclasses.dataclass(frozen=True)
class Job:
  """The unit of work of a backend.

  Attributes:
    cell: the cell, overrides applied.
    run_dir: its directory.
    command: the command that trains it and, when run again, resumes it.
  """

  cell: Cell
  run_dir: RunDir
  command: tuple[str, ...]

  @property
  def name(self) -> str:
    return self.cell.name

  def is_finished(self) -> bool:
    """Whether its run is finished. False if its files are unreadable: the trainer decides."""
    try:
      self.run_dir.check_source(self.cell.config)
      return ends.is_finished(self.run_dir) and self.run_dir.check_identity(self.cell)
    except FieldError:
      return False

  def missing_trunk(self) -> RunDir | None:
    """Returns the run it branches from while that has not saved the branch step, else None."""
    trunk = self.run_dir.trunk(self.cell.config)
    if (trunk is None or trunk.has_checkpoint(self.cell.config.train.branch_step)
        or self.run_dir.has_checkpoint()):
      return None
    return trunk

  def missing_source(self) -> RunDir | None:
    """Returns the run whose parameters it starts from while those are not saved, else None."""
    source, step = self.run_dir.source(self.cell.config), self.cell.config.train.init_step
    if source is None or self.run_dir.has_checkpoint():
      return None
    if step is not None:
      return None if source.has_checkpoint(step) else source
    with contextlib.suppress(FieldError):  # a damaged status: its trainer decides
      if ends.is_finished(source) and source.has_checkpoint():
        return None
    return source


def train_command(cell: Cell, out: str | os.PathLike,
                  overrides: Sequence[str]) -> tuple[str, ...]:
  """Returns the trainer's command line for one cell, with this interpreter."""
  return (sys.executable, "-m", "moe_jax.train", f"--config={cell.selector}",
          f"--out={os.fspath(out)}", *overrides)


def jobs_of(cells: Sequence[Cell], out: str | os.PathLike,
            overrides: Sequence[str]) -> tuple[Job, ...]:
  """Returns the jobs of the cells, each after its predecessors; reads no files.

  Args:
    cells: what `--config` and the overrides select.
    out: root of the run directories.
    overrides: the raw --config.PATH=VALUE arguments that `cells` were made with.
  """
  root = epath.Path(out)
  return _predecessors_first([
      Job(cell, RunDir(root / cell.experiment / cell.name), train_command(cell, out, overrides))
      for cell in cells])


def plan(cells: Sequence[Cell], out: str | os.PathLike,
         overrides: Sequence[str]) -> tuple[Job, ...]:
  """Like `jobs_of`, but also checks the run directories.

  Raises:
    FieldError: `out` is unreachable, or a run directory holds a run of another identity (the
      message names the fields) or source. Damaged files are left for the trainer to refuse.
  """
  jobs = jobs_of(cells, out, overrides)
  with reaching(out):
    for job in jobs:
      RunDir.of(out, job.cell)
      with contextlib.suppress(DamagedFile):
        job.run_dir.check_identity(job.cell)
        job.run_dir.check_source(job.cell.config)
  return jobs


def lost_ends(jobs: Sequence[Job]) -> list[str]:
  """Returns a line for each finished run that lost its last checkpoint and must be resumed."""
  lines = []
  for job in jobs:
    with contextlib.suppress(FieldError):  # left for the trainer to refuse
      if (lost := ends.lost_end(job.run_dir)) is not None:
        lines.append(f"{job.name} was finished, but {lost}: it resumes from an intact checkpoint")
  return lines


def require_sources(jobs: Sequence[Job]) -> None:
  """Raises FieldError if a run's trunk or source is neither submitted nor saved, or does not fit.

  Fails before paid machines, or the time to start JAX, are spent on a run that cannot begin.
  """
  ours = {job.run_dir for job in jobs}
  found = predecessors(jobs)
  for job in jobs:
    train = job.cell.config.train
    if (train.branch_run or train.init_run) is None or job.is_finished():
      continue  # the trunk or source of a finished run may have been deleted since
    _require_trunk(job, ours)
    if (source := job.missing_source()) is not None:
      require(not _waits_for_itself(job.name, found), "config.train.init_from", train.init_from,
              f"makes {job.name} wait for itself")
      _require_source(job, source, ours)


def _require_trunk(job: Job, ours: set[RunDir]) -> None:
  config = job.cell.config
  trunk = job.run_dir.trunk(config)
  if trunk is None or trunk in ours or job.run_dir.has_checkpoint():
    return
  if job.missing_trunk() is not None:
    raise FieldError("config", job.name, f"branches from {trunk.path.parent.name}/"
                     f"{trunk.path.name}, which has not saved step "
                     f"{config.train.branch_step} and is not part of this submission")
  with contextlib.suppress(DamagedFile):  # left for the trainer to refuse
    if (theirs := trunk.read_config()) is not None:
      try:
        branch.require_trunk(config, theirs)
      except FieldError as error:
        raise FieldError("config", job.name, str(error)) from None


def _require_source(job: Job, source: RunDir, ours: set[RunDir]) -> None:
  if source in ours:
    return
  train = job.cell.config.train
  why = ("that run has not finished, or has lost its last checkpoint,"
         if train.init_step is None and source.has_checkpoint() else
         "that checkpoint does not exist")
  raise FieldError("config.train.init_from", train.init_from,
                   f"is the source of {job.name}, but {why} and the run is not part of this "
                   "submission")


def require_texts(jobs: Sequence[Job], out: str) -> None:
  """Raises FieldError if a corpus is neither built in nor where the machines look for it."""
  wanted = {name for job in jobs for name in job.cell.config.data.mixture} - CORPORA.keys()
  for name in sorted(wanted):
    if not (epath.Path(out) / "_data" / name / "dataset" / CARD).exists():
      raise FieldError("config.data.corpus", name, f"is neither built in nor in {out}/_data")


def trained_together(jobs: Sequence[Job]) -> list[tuple[Job, ...]]:
  """Groups the unfinished jobs as they are trained: those of one shape share a process where
  `execution.population` says so; every other job is alone."""
  by_name = {job.name: job for job in jobs if not job.is_finished()}
  return [tuple(by_name[cell.name] for cell in group)
          for group in deal([job.cell for job in by_name.values()])]


def joint_command(commands: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
  """Merges commands that differ only in their cells into one that trains them in one process."""
  first, *others = commands
  others = [selection.rpartition(":")[2] for command in others for selection in command
            if selection.startswith("--config=")]
  return tuple(",".join([word, *others]) if word.startswith("--config=") else word
               for word in first)


def predecessors(jobs: Sequence[Job]) -> dict[str, tuple[str, ...]]:
  """Returns job name -> the names of its predecessors among the jobs: its trunk, and the run
  whose parameters it starts from."""
  names = {job.name: job.name for job in jobs}
  by_path = {f"{job.cell.experiment}/{job.name}": job.name for job in jobs}
  found = {job.name: (names.get(job.cell.config.train.branch_run),
                      by_path.get(job.cell.config.train.init_run)) for job in jobs}
  return {name: tuple(other for other in others if other is not None)
          for name, others in found.items()}


def _waits_for_itself(name: str, found: Mapping[str, Sequence[str]]) -> bool:
  ahead, seen = list(found[name]), set()
  while ahead:
    if (other := ahead.pop()) not in seen:
      seen.add(other)
      ahead += found[other]
  return name in seen


def _predecessors_first(jobs: Sequence[Job]) -> tuple[Job, ...]:
  found = predecessors(jobs)

  depth = dict.fromkeys(found, 0)
  for _ in found:  # an upper bound on a chain; a cycle, which is refused later, has no order
    deeper = {name: max((1 + depth[other] for other in others), default=0)
              for name, others in found.items()}
    if deeper == depth:
      break
    depth = deeper
  return tuple(sorted(jobs, key=lambda job: depth[job.name]))
