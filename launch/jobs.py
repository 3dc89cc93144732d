"""A job: one cell, its run directory, the command that trains it, and launch.json."""

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

# What a launcher says of a cell, where the trainer's own states do not fit.
STARTING = "starting"  # launched, not ended; the trainer may not have spoken yet
REFUSED = "refused"  # the trainer found its input bad
BUSY = "busy"  # another process holds the run directory
STOPPED = "stopped"  # told to stop, and ended before it had saved


@dataclasses.dataclass(frozen=True)
class Launch:
  """launch.json: the launcher's last word on a run.

  Attributes:
    backend: name of the backend.
    command: the trainer's command line.
    attempt: how many times the run has been launched.
    host, pid: the trainer's process.
    started, ended: seconds since the epoch; None while it runs.
    state: `starting`, and in the end how it ended.
    exit_code: of the trainer; negative is the signal that killed it.
    error: one line, where it did not finish.
    failures: how many attempts the program itself failed, where a budget of them is kept, since
      the run last saved something new.
    saved: the newest step that was saved when it began.
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
  """None where the run has never been launched. Raises FieldError on a damaged file."""
  return read_as(Launch, run_dir.launch)


def write_launch(run_dir: RunDir, launch: Launch) -> None:
  write_json(run_dir.launch, dataclasses.asdict(launch))


@dataclasses.dataclass(frozen=True)
class Job:
  """What a backend runs.

  Attributes:
    cell: the cell, overrides applied.
    run_dir: its directory.
    command: the command that trains it and, run again, goes on with it.
  """

  cell: Cell
  run_dir: RunDir
  command: tuple[str, ...]

  @property
  def name(self) -> str:
    return self.cell.name

  def is_finished(self) -> bool:
    """Whether its run is done. One whose files cannot be read is not: the trainer decides."""
    try:
      self.run_dir.check_source(self.cell.config)
      return ends.is_finished(self.run_dir) and self.run_dir.check_identity(self.cell)
    except FieldError:
      return False

  def missing_trunk(self) -> RunDir | None:
    """The run it branches from, while that has not saved the step where this one begins."""
    trunk = self.run_dir.trunk(self.cell.config)
    if (trunk is None or trunk.has_checkpoint(self.cell.config.train.branch_step)
        or self.run_dir.has_checkpoint()):
      return None
    return trunk

  def missing_source(self) -> RunDir | None:
    """The run with whose parameters it begins, while that has not saved them."""
    train = self.cell.config.train
    if train.init_run is None or self.run_dir.has_checkpoint():
      return None
    source = RunDir.named(self.run_dir.path.parent.parent, train.init_run)
    if train.init_step is not None:
      return None if source.has_checkpoint(train.init_step) else source
    with contextlib.suppress(FieldError):  # a damaged status: its trainer decides
      if ends.is_finished(source) and source.has_checkpoint():
        return None
    return source


def train_command(cell: Cell, out: str | os.PathLike,
                  overrides: Sequence[str]) -> tuple[str, ...]:
  """The trainer's command line for one cell, with this interpreter."""
  return (sys.executable, "-m", "moe_jax.train", f"--config={cell.selector}",
          f"--out={os.fspath(out)}", *overrides)


def jobs_of(cells: Sequence[Cell], out: str | os.PathLike,
            overrides: Sequence[str]) -> tuple[Job, ...]:
  """The jobs of the cells, each behind those that it goes on from; reads nothing.

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
  """The same, after a look at the run directories.

  Raises:
    FieldError: `out` is out of reach, or a run directory holds a run of another identity;
      names the fields. One whose files are damaged is its trainer's to refuse.
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
  """A line for each run that had finished and whose end is lost: it is trained again."""
  lines = []
  for job in jobs:
    with contextlib.suppress(FieldError):  # the trainer's to refuse
      if (lost := ends.lost_end(job.run_dir)) is not None:
        lines.append(f"{job.name} was finished, but {lost}: it goes on from one that is sound")
  return lines


def require_sources(jobs: Sequence[Job]) -> None:
  """Raises FieldError where what a run begins from is neither among the jobs nor there, or is of
  no use to it.

  Machines that cost money, or a start of JAX, should not be spent on what cannot begin.
  """
  ours = {job.run_dir for job in jobs}
  found = predecessors(jobs)
  for job in jobs:
    train = job.cell.config.train
    if (train.branch_run or train.init_run) is None or job.is_finished():
      continue  # of one that is finished, what it began from may have been deleted since
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
                     f"{config.train.branch_step} and is not submitted with it")
  with contextlib.suppress(DamagedFile):  # its trainer's to refuse
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
         "that checkpoint is not there,")
  raise FieldError("config.train.init_from", train.init_from,
                   f"is to begin {job.name}: {why} and the run is not submitted with it")


def require_texts(jobs: Sequence[Job], out: str) -> None:
  """Raises FieldError where a text is neither built in nor where the machines look for it."""
  wanted = {name for job in jobs for name in job.cell.config.data.mixture} - CORPORA.keys()
  for name in sorted(wanted):
    if not (epath.Path(out) / "_data" / name / "dataset" / CARD).exists():
      raise FieldError("config.data.corpus", name, f"is neither built in nor in {out}/_data")


def trained_together(jobs: Sequence[Job]) -> list[tuple[Job, ...]]:
  """The jobs that are not finished, in the groups in which they are trained: those of one shape
  in one process where `execution.population` says so, every other by itself."""
  by_name = {job.name: job for job in jobs if not job.is_finished()}
  return [tuple(by_name[cell.name] for cell in group)
          for group in deal([job.cell for job in by_name.values()])]


def joint_command(commands: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
  """The command that trains in one process what each of them trains, which differ in their cells
  alone."""
  first, *others = commands
  others = [selection.rpartition(":")[2] for command in others for selection in command
            if selection.startswith("--config=")]
  return tuple(",".join([word, *others]) if word.startswith("--config=") else word
               for word in first)


def predecessors(jobs: Sequence[Job]) -> dict[str, tuple[str, ...]]:
  """For each job's name those of the others that it goes on from: its trunk, and the run with
  whose parameters it begins."""
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
  for _ in found:  # no chain is longer; in a circle, which is refused later, there is no first
    deeper = {name: max((1 + depth[other] for other in others), default=0)
              for name, others in found.items()}
    if deeper == depth:
      break
    depth = deeper
  return tuple(sorted(jobs, key=lambda job: depth[job.name]))
