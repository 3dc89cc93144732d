"""Finds what an experiment has on other machines, from the files that its submission wrote."""

import json
import pathlib
from collections.abc import Sequence

from absl import flags
from etils import epath

from launch import cloud, driver, remote, slices
from launch.backends import gcloud
from launch.backends.gcloud import Options
from launch.backends.gke import kubectl_in
from moe_jax.errors import FieldError, require
from moe_jax.files import absolute, reaching, write_bytes

flags.disclaim_key_flags()  # the --help of each command lists them

_SMALL = ("config.json", "status.json", "launch.json", "metrics/*.jsonl", "eval/*.json",
          "eval/*.npz", "eval/steps/*/*.json", "checksums/*.json")


def define_flags() -> tuple[flags.FlagHolder, flags.FlagHolder]:
  """Declares --out and --experiment, which select what a command acts on."""
  return (flags.DEFINE_string("out", "runs", "Root of the run directories."),
          flags.DEFINE_string("experiment", None, "Name of the experiment: its directory under "
                              "--out.", required=True))


def folder_of(out: str, experiment: str) -> epath.Path:
  """Returns the folder of the experiment's slices. Raises FieldError if nothing was submitted."""
  found = epath.Path(absolute(out)) / experiment / "_slices"
  with reaching(out):
    require("/" not in experiment and found.exists(), "experiment", experiment,
            f"was not submitted to other machines from --out={out}")
    require(bool(submissions(found)), "experiment", experiment, "was only partly submitted: no "
            "machines were requested; run the same launch.submit again")
  return found


def submissions(folder: epath.Path) -> dict[str, list[epath.Path]]:
  """Returns backend -> the folders of what was submitted through it."""
  marks = {"gcloud": "slice.json", "gke": "jobset.json", "slurm": "run.sh"}
  found = {backend: sorted(file.parent for file in folder.glob(f"*/{mark}"))
           for backend, mark in marks.items()}
  return {backend: folders for backend, folders in found.items() if folders}


def kubectl_for(jobset: epath.Path, context: str | None, *arguments: str) -> Sequence[str]:
  """Returns a kubectl command in the namespace of the JobSet whose folder is given."""
  manifest = json.loads((jobset / "jobset.json").read_text())
  return kubectl_in(manifest["metadata"]["namespace"], context, *arguments)


def one_of(folders: Sequence[epath.Path], name: str | None) -> epath.Path:
  """Returns the folder of that name or, without a name, the only one. Raises FieldError."""
  names = [folder.name for folder in folders]
  if name is None and len(names) == 1:
    return folders[0]
  if name not in names:
    raise FieldError("slice", name or "", "must be one of " + ", ".join(names))
  return folders[names.index(name)]


def log_command(one: epath.Path, backend: str, worker: str, lines: int, follow: bool,
            context: str | None) -> tuple[str, ...]:
  """Returns the command that shows the log. Raises FieldError if the slice has no machines."""
  require(worker == "all" or worker.isdecimal(), "worker", worker, "must be a number or all")
  tail = ("tail", f"--lines={lines}", *(("--follow=name", "--retry") if follow else ()))
  if backend == "slurm":
    require(worker.isdecimal(), "worker", worker, "must be a number: each task has its own log")
    return (*tail, f"{one}/log-{worker}.txt")
  if backend == "gke":
    index = (() if worker == "all" else
             (f"batch.kubernetes.io/job-completion-index={worker}",))
    selector = ",".join((f"jobset.sigs.k8s.io/jobset-name={one.name}", *index))
    return tuple(kubectl_for(one, context, "logs", f"--selector={selector}",
                                   f"--tail={lines}", "--prefix", "--max-log-requests=64",
                                   *(("--follow",) if follow else ())))
  found = driver.Slice.read(one)
  require(found.record.state == slices.ACTIVE, "slice", one.name,
          f"is {found.record.state}: it has no machines to read a log from")
  return gcloud.ssh(found.record.name, found.options, found.record.zone,
                    " ".join((*tail, "/var/lib/moe_jax/log.txt")), worker)


def orphans(options: Options, out: epath.Path, run: remote.Run) -> list[tuple[str, str, str]]:
  """Returns (name, zone, label) of each resource that no slice at work accounts for.

  Raises:
    cloud.Unclear, cloud.NoCredentials: gcloud gave no usable answer.
  """
  # Listed before the records are read, since a record is written before its resource exists.
  there = {zone: cloud.list_ours(options, zone, run) for zone in options.zones}
  accounted = {(one.record.name, one.record.zone, one.label)
               for folder in out.glob("*/_slices") for one in driver.read_all(folder)
               if one.record.state not in slices.FINAL}
  return sorted((name, zone, label) for zone, found in there.items()
                for name, label in found.items() if (name, zone, label) not in accounted)


def copy_home(source: epath.Path, target: pathlib.Path) -> tuple[int, int]:
  """Copies an experiment's small files. Returns (files copied, files that were there already)."""
  copied = same = 0
  for kind in _SMALL:
    for file in source.glob(f"[!_]*/{kind}"):
      there = epath.Path(target) / file.relative_to(source)
      # Metrics files only grow; all others may have been rewritten.
      if file.suffix == ".jsonl" and there.exists() and (
          there.stat().length == file.stat().length):
        same += 1
        continue
      write_bytes(there, file.read_bytes())
      copied += 1
  return copied, same
