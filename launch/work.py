"""Defines work.json, one slice's work, which the launcher writes and `launch.host` reads."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Mapping, Sequence

from etils import epath

from launch import ends
from launch.code import Code
from launch.jobs import REFUSED, joint_command, read_launch
from launch.shares import Share
from moe_jax import population
from moe_jax.errors import DamagedFile, FieldError
from moe_jax.fields import from_json
from moe_jax.files import read_as
from moe_jax.run_dir import DIVERGED, FINISHED, RunDir

MAX_FAILURES = 3  # times a cell's program may fail before it is given up


@dataclasses.dataclass(frozen=True)
class HostWord:
  """The latest report of a machine of the slice, stored in host-SLICE-HOST.json.

  Attributes:
    state: state of its agent.
    trouble: why the machine is unusable.
    cell: the cell that it is training.
    host, pid: the agent's process.
    heartbeat: when it wrote this, by its own clock.
    life: which life of all the hosts, where SLURM or JobSet counts restarts (machine.life).
  """

  state: str
  trouble: str | None
  cell: str | None
  host: str
  pid: int
  heartbeat: float
  life: str = ""


def read_host(file: epath.Path) -> HostWord | None:
  """Reads a report; None if the file is gone or damaged, which counts as no report."""
  with contextlib.suppress(DamagedFile):
    return read_as(HostWord, file)
  return None


@dataclasses.dataclass(frozen=True)
class Work:
  """The cells of a slice.

  Attributes:
    name: name of the slice.
    experiment, out: the experiment and --out of all its cells.
    cells: name -> the trainer's command line; its first word stands for the interpreter.
    hosts: number of machines that take part in each run.
    secrets: variable -> where its value is stored, never the value.
    max_failures: how often a cell's program may fail before the cell is given up.
    backend: name of the backend.
    commit: commit of the code.
    usd_per_second: US dollars per second of the machines; 0 where it is not counted.
    trunks: branch -> (its trunk among the slice's cells, the branch step).
    sources: run -> (the cell of the slice whose parameters it begins with, the step of that; None
      for its last).
    groups: all cells in the groups that one process may train together, in the order in which
      they are trained; if empty, each cell is trained alone.
  """

  name: str
  experiment: str
  out: str
  cells: Mapping[str, tuple[str, ...]]
  hosts: int = 1
  secrets: Mapping[str, str] = dataclasses.field(default_factory=dict)
  max_failures: int = MAX_FAILURES
  backend: str = ""
  commit: str = ""
  usd_per_second: float = 0.0
  trunks: Mapping[str, tuple[str, int]] = dataclasses.field(default_factory=dict)
  sources: Mapping[str, tuple[str, int | None]] = dataclasses.field(default_factory=dict)
  groups: tuple[tuple[str, ...], ...] = ()

  def in_groups(self) -> tuple[tuple[str, ...], ...]:
    """Returns the cells in the groups in which they are trained; see `groups`."""
    return self.groups or tuple((name,) for name in self.cells)

  def command(self, names: Sequence[str]) -> tuple[str, ...]:
    """Returns the command line that trains cells of one group in one process."""
    return joint_command([self.cells[name] for name in names])

  def run_dir(self, name: str) -> RunDir:
    """Returns the run directory of a cell."""
    return RunDir(epath.Path(self.out) / self.experiment / name)


def work_of(share: Share, code: Code, out: str, backend: str, hosts: int = 1,
            secrets: Mapping[str, str] | None = None, usd_per_second: float = 0.0) -> Work:
  """Returns the work of a share; its commands name the experiment file in the unpacked code."""
  cells = {job.name: ("python", *(_in_archive(word, code) for word in job.command[1:]))
           for job in share.jobs}
  here = {job.run_dir: job.name for job in share.jobs}
  trunks = {job.name: (here[trunk], job.cell.config.train.branch_step) for job in share.jobs
            if (trunk := job.run_dir.trunk(job.cell.config)) in here}
  sources = {job.name: (here[source], job.cell.config.train.init_step) for job in share.jobs
             if (source := job.run_dir.source(job.cell.config)) in here}
  groups = tuple(tuple(cell.name for cell in group)
                 for group in population.deal([job.cell for job in share.jobs]))
  return Work(share.name, share.jobs[0].cell.experiment, out, cells, hosts, secrets or {},
              backend=backend, commit=code.commit, usd_per_second=usd_per_second, trunks=trunks,
              sources=sources, groups=groups)


def _in_archive(word: str, code: Code) -> str:
  if not word.startswith("--config="):
    return word
  return f"--config={code.experiment}:{word.rpartition(':')[2]}"


def why_ended(work: Work, name: str) -> str | None:
  """Returns `finished`, or why the cell is given up; None while it may still be tried."""
  run_dir = work.run_dir(name)
  try:
    if ends.is_finished(run_dir):
      return FINISHED
    launch = read_launch(run_dir)
  except FieldError as error:
    return f"given up: {error}"
  if not run_dir.has_checkpoint() and (why := _why_not_begun(work, name)) is not None:
    return f"given up: {why}"
  if launch is None:
    return None
  if launch.state in (REFUSED, DIVERGED):
    return f"given up: {launch.state}: {launch.error}"
  if launch.failures >= work.max_failures:
    return f"given up after {launch.failures} failures: {launch.error}"
  return None


def _why_not_begun(work: Work, name: str) -> str | None:
  """Returns why what a cell begins from will never be saved; None where it is, or may yet be."""
  for kind, begins in (("trunk", work.trunks), ("source", work.sources)):
    if name in begins:
      other, step = begins[name]
      end = why_ended(work, other)
      if step is None and end not in (None, FINISHED):
        return f"its {kind} {other} did not finish"
      if step is not None and end is not None and not work.run_dir(other).has_checkpoint(step):
        return f"its {kind} {other} ended before it saved step {step}"
  return None


def to_text(work: Work) -> str:
  return json.dumps(dataclasses.asdict(work), indent=1) + "\n"


def from_text(text: str, where: str | os.PathLike) -> Work:
  """Parses work.json. Raises DamagedFile, which names `where`."""
  try:
    return from_json(Work, json.loads(text))
  except (json.JSONDecodeError, FieldError) as error:
    raise DamagedFile("work", os.fspath(where), f"is damaged: {error}") from None
