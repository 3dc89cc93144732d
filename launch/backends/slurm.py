"""Runs cells on a SLURM cluster with a shared file system: an sbatch array, one task per share.

JAX wants one task per GPU of a node, with all of the node's GPUs visible to each, so that is what
sbatch requests. A task that SLURM preempts or stops at its time limit saves and is requeued.
"""

import dataclasses
import os
import re
import shlex
import sys
from collections.abc import Sequence
from importlib import resources

from launch import remote, work
from launch.code import Code
from launch.jobs import Job
from launch.naming import digest, resource_name
from launch.options import option, parse_secrets, require_python, require_words
from launch.plans import File, Plan, SlicePlan
from launch.shares import deal, families
from moe_jax.errors import require


@dataclasses.dataclass(frozen=True)
class Options:
  """Flags of this backend; see each field's help."""

  slices: int | None = option("Number of array tasks to distribute the cells over; by default "
                              "one per family.", default=None)
  max_running: int | None = option("Maximum number of array tasks at a time.", default=None)
  nodes: int = option("Nodes per run.", default=1)
  gpus_per_node: int = option("GPUs per node; 0 trains on the CPU.", default=1)
  tasks_per_node: int | None = option("Processes per node with --gpus_per_node=0.",
                                      default=None)
  partition: str | None = option("SLURM partition.", default=None)
  account: str | None = option("SLURM account.", default=None)
  time: str | None = option("Time limit in sbatch's format, e.g. 24:00:00; a task that reaches "
                            "it saves and is requeued.", default=None)
  python: str | None = option("Interpreter on the nodes; by default the one that runs "
                              "launch.submit.", default=None)
  secrets: tuple[str, ...] = option("Environment variables of the trainer: "
                                    "NAME=/file/on/the/nodes.", default=())

  def __post_init__(self):
    require_words(self, "partition", "account")
    for name in ("slices", "max_running", "nodes", "tasks_per_node"):
      value = getattr(self, name)
      require(value is None or value >= 1, name, value, "must be at least 1")
    require(self.gpus_per_node >= 0, "gpus_per_node", self.gpus_per_node, "must be at least 0")
    require(self.tasks_per_node is None or not self.gpus_per_node, "tasks_per_node",
            self.tasks_per_node, "is only for --gpus_per_node=0: each GPU has one process")
    require(self.time is None or re.fullmatch(r"([0-9]+-)?[0-9]+(:[0-9]{1,2}){0,2}", self.time)
            is not None, "time", self.time, "must be MINUTES, HH:MM:SS or DAYS-HH:MM:SS")
    require_python(self.python)
    for name, where in parse_secrets(self.secrets).items():
      require(where.startswith("/"), "secrets", name, "must be NAME=/file/on/the/nodes")

  @property
  def tasks(self) -> int:
    """Processes on each node."""
    return self.gpus_per_node or self.tasks_per_node or 1

  @property
  def run_devices(self) -> int:
    """JAX devices of each run; on CPUs a lower bound, one per process."""
    return self.nodes * self.tasks

  @property
  def devices(self) -> int | None:
    """GPUs of each run; None on CPUs, whose devices are known only on the nodes."""
    return self.nodes * self.gpus_per_node or None


def plan(jobs: Sequence[Job], options: Options, code: Code, out: str) -> Plan:
  """Plans one array for all jobs. Raises FieldError if `out` is not an absolute path."""
  require(out.startswith("/"), "out", out, "must be a directory that all nodes see")
  shares = deal(jobs, options.slices or len(families(jobs)))
  experiment = jobs[0].cell.experiment
  name = job_name(jobs)
  hosts = options.nodes * options.tasks
  secrets = parse_secrets(options.secrets)
  files = [File(f"{name}/{index}/work.json", work.to_text(dataclasses.replace(
      work.work_of(share, code, out, "slurm", hosts, secrets), name=f"{name}/{index}")))
           for index, share in enumerate(shares)]
  slices = f"{out}/{experiment}/_slices"
  files.append(File(f"{name}/run.sh", script(f"{slices}/{name}", options, code, out)))
  command = sbatch(name, len(shares), options, f"{slices}/{name}")
  cells = tuple(job.name for share in shares for job in share.jobs)
  return Plan("slurm", experiment, slices, (SlicePlan(name, cells, tuple(files), (command,)),))


def job_name(jobs: Sequence[Job]) -> str:
  """Returns the array's name, the same for the same cells under the same --out."""
  tag = digest(*(os.fspath(job.run_dir.path) for job in jobs))
  return f"{resource_name(jobs[0].cell.experiment, 40)}-{tag}"


def sbatch(name: str, tasks: int, options: Options, folder: str) -> tuple[str, ...]:
  """Returns the command that submits the array, whose files are in `folder`."""
  limit = "" if options.max_running is None else f"%{options.max_running}"
  gpus = (f"--gpus-per-node={options.gpus_per_node}",) if options.gpus_per_node else ()
  optional = {"--partition": options.partition, "--account": options.account,
              "--time": options.time}
  return ("sbatch", "--parsable", f"--job-name={name}", f"--array=0-{tasks - 1}{limit}",
          f"--nodes={options.nodes}", f"--ntasks-per-node={options.tasks}", *gpus,
          "--requeue", "--signal=TERM@120", "--open-mode=append",
          f"--output={_pattern(folder)}/log-%a.txt",
          *(f"{flag}={value}" for flag, value in optional.items() if value is not None),
          f"{folder}/run.sh")


def _pattern(folder: str) -> str:
  """Escapes a folder for use in an sbatch file name pattern, where % is special."""
  return folder.replace("%", "%%")


def queued(name: str) -> tuple[str, ...]:
  """Returns the command that prints a line for each queued or running task of the array."""
  return ("squeue", "--noheader", "--me", f"--name={name}", "--format=%i %T")


def script(folder: str, options: Options, code: Code, out: str) -> str:
  """Returns the script that each array task runs."""
  values = {"CODE": f"{out}/_code/{code.file_name}", "SHA256": code.sha256, "FOLDER": folder,
            "PYTHON": options.python or sys.executable}
  text = resources.files("launch.host").joinpath("slurm.sh").read_text()
  return re.sub(r"@([A-Z0-9]+)@", lambda found: shlex.quote(values[found[1]]), text)


def submit(planned: Plan, jobs: Sequence[Job], options: Options, code: Code, out: str,
           run: remote.Run = remote.run) -> int:
  """Submits the array unless it is queued or running. Returns the launcher's exit code."""
  (array,) = planned.slices
  waiting = run(queued(array.name))
  if not waiting.ok:
    print(f"nothing was submitted: {waiting.error}")
    return 1
  if tasks := waiting.stdout.split("\n")[:-1]:
    print(f"{array.name} is already in the queue: {'; '.join(tasks)}")
    return 0
  if (error := remote.why_not_writable(out)) is not None:
    print(f"nothing was submitted: {error}")
    return 1
  remote.begin_anew(planned, array, jobs)
  remote.upload(code, out)
  remote.write_files(planned, array)
  answer = run(array.commands[0])
  if not answer.ok:
    print(f"{array.name} was not submitted: {answer.error}")
    return 1
  print(f"{array.name} was submitted as job {answer.stdout.strip()}; its logs are "
        f"{planned.out}/{array.name}/log-*.txt")
  return 0
