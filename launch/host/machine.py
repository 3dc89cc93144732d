"""Inspects the machine that an agent runs on: its number, its accelerator, its secrets."""

import os
import pathlib
import re
import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping

LEADER = "0-0"
_METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"


def metadata(key: str) -> str | None:
  """Returns a metadata attribute of this Google Cloud machine, or None."""
  request = urllib.request.Request(_METADATA + key, headers={"Metadata-Flavor": "Google"})
  try:
    with urllib.request.urlopen(request, timeout=5) as answer:
      return answer.read().decode()
  except (OSError, urllib.error.URLError):
    return None


def worker_number(hosts: int, environ: Mapping[str, str],
                  read: Callable[[str], str | None] = metadata) -> str:
  """Returns this machine's `SLICE-HOST` number within its run; the leader's is `0-0`.

  Args:
    hosts: number of hosts of the run.
    environ: os.environ, where SLURM and Kubernetes put the number.
    read: reads a key of the metadata server, where Cloud TPU puts it.

  Raises:
    RuntimeError: the run has several hosts and nothing says which one this is.
  """
  if hosts == 1:
    return LEADER
  if "SLURM_PROCID" in environ:
    return f"0-{environ['SLURM_PROCID']}"
  if "JOB_COMPLETION_INDEX" in environ:
    return f"{environ.get('MOE_JAX_SLICE', '0')}-{environ['JOB_COMPLETION_INDEX']}"
  host = read("agent-worker-number")
  if host is None:
    raise RuntimeError(f"the run has {hosts} hosts, and neither SLURM, Kubernetes nor Cloud "
                       "TPU's metadata says which this one is")
  about = read("tpu-env")
  if about is None:  # assuming slice 0 might create a second leader
    raise RuntimeError("the metadata server returned no tpu-env, which says which slice this "
                       "host belongs to")
  found = re.search(r"^MEGASCALE_SLICE_ID: *'?([0-9]+)", about, re.MULTILINE)
  return f"{found[1] if found else 0}-{host.strip()}"


def life(environ: Mapping[str, str]) -> str:
  """Returns SLURM's or JobSet's restart count, which identifies this life of all hosts.

  TPU VMs have none and get "": their launcher clears the folder before it requests new VMs.
  """
  return environ.get("SLURM_RESTART_COUNT") or environ.get("MOE_JAX_RESTART") or ""


def trouble(proc: pathlib.Path = pathlib.Path("/proc"),
            lock: pathlib.Path = pathlib.Path("/tmp/libtpu_lockfile")) -> str | None:
  """Returns why the accelerator is unavailable, in one line, or None.

  Removes a stale lock file of libtpu if no process holds the chips.
  """
  for link in proc.glob("[0-9]*/fd/*"):
    try:
      target = os.readlink(link)
    except OSError:  # the process ended meanwhile
      continue
    if re.fullmatch(r"/dev/(vfio/[0-9]+|accel[0-9]+)", target):
      return f"{target} is held by process {link.parts[-3]}"
  try:
    lock.unlink(missing_ok=True)
  except OSError as error:
    return f"{lock} is stale and cannot be removed: {error.strerror}"
  return None


def say_at_work(environ: Mapping[str, str]) -> None:
  """Tells the start-up script, if any, that the agent counts this slice's cost from now on."""
  if file := environ.get("MOE_JAX_AT_WORK"):
    pathlib.Path(file).touch()


def read_secrets(secrets: Mapping[str, str]) -> dict[str, str]:
  """Returns variable -> value, read from a file or, through gcloud, from Secret Manager.

  Raises:
    RuntimeError: a secret cannot be read; the message names it and its location.
  """
  return {name: _read_secret(name, where) for name, where in secrets.items()}


def secret_command(where: str) -> tuple[str, ...]:
  """Returns the command that prints a secret's version, projects/P/secrets/S/versions/V."""
  _, project, _, secret, _, version = where.split("/")
  return ("gcloud", "secrets", "versions", "access", version, f"--secret={secret}",
          f"--project={project}")


def _read_secret(name: str, where: str) -> str:
  try:
    if where.startswith("/"):
      return pathlib.Path(where).read_text().rstrip("\n")
    return subprocess.run(secret_command(where), check=True, capture_output=True, text=True,
                          timeout=120).stdout
  except (OSError, ValueError, subprocess.SubprocessError) as error:
    reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1:]
    raise RuntimeError(f"secret {name} cannot be read from {where}: {''.join(reason)}") from None
