"""A job: one cell, its run directory, the command that trains it, and launch.json."""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Sequence

from etils import epath

from launch import ends
from moe_jax.data.corpus import CARD, CORPORA
from moe_jax.errors import DamagedFile, FieldError
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


def train_command(cell: Cell, out: str | os.PathLike,
                  overrides: Sequence[str]) -> tuple[str, ...]:
  """The trainer's command line for one cell, with this interpreter."""
  return (sys.executable, "-m", "moe_jax.train", f"--config={cell.selector}",
          f"--out={os.fspath(out)}", *overrides)


def jobs_of(cells: Sequence[Cell], out: str | os.PathLike,
            overrides: Sequence[str]) -> tuple[Job, ...]:
  """The jobs of the cells, trunks before their branches; reads nothing.

  Args:
    cells: what `--config` and the overrides select.
    out: root of the run directories.
    overrides: the raw --config.PATH=VALUE arguments that `cells` were made with.
  """
  root = epath.Path(out)
  return _trunks_first([
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
  return jobs


def lost_ends(jobs: Sequence[Job]) -> list[str]:
  """A line for each run that had finished and whose end is lost: it is trained again."""
  lines = []
  for job in jobs:
    with contextlib.suppress(FieldError):  # the trainer's to refuse
      if (lost := ends.lost_end(job.run_dir)) is not None:
        lines.append(f"{job.name} was finished, but {lost}: it goes on from one that is sound")
  return lines


def require_trunks(jobs: Sequence[Job]) -> None:
  """Raises FieldError where what a run begins from is neither among the jobs nor there.

  Machines that cost money should not be there for what cannot begin.
  """
  ours = {job.run_dir for job in jobs}
  for job in jobs:
    _require_source(job, ours)
    if job.run_dir.trunk(job.cell.config) in ours:
      continue
    if (trunk := job.missing_trunk()) is not None:
      raise FieldError("config", job.name, f"branches from {trunk.path.parent.name}/"
                       f"{trunk.path.name}, which has not saved step "
                       f"{job.cell.config.train.branch_step} and is not submitted with it")


def _require_source(job: Job, ours: set[RunDir]) -> None:
  train = job.cell.config.train
  if train.init_run is None or job.run_dir.has_checkpoint():
    return
  source = RunDir.named(job.run_dir.path.parent.parent, train.init_run)
  if source not in ours and not source.has_checkpoint(train.init_step):
    raise FieldError("config.train.init_from", train.init_from, f"is to begin {job.name}: that "
                     "checkpoint is not there, and the run is not submitted with it")


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


def _trunks_first(jobs: Sequence[Job]) -> tuple[Job, ...]:
  by_name = {job.name: job for job in jobs}

  def depth(job: Job) -> int:
    trunk = by_name.get(job.cell.config.train.branch_run)
    return 0 if trunk is None else 1 + depth(trunk)

  return tuple(sorted(jobs, key=depth))
