"""Runs cells on Cloud TPU slices, requested as queued resources with gcloud's GA commands.

Each share of the grid gets one queued resource, whose machines run `launch/host/startup.sh` at
every boot. This API does not serve tpu7x and later; `--backend=gke` does.
"""

import dataclasses
import re
import shlex
from collections.abc import Sequence
from importlib import resources
from typing import Literal

from etils import epath

from launch import budget, money, remote, tpu, work
from launch.code import Code
from launch.jobs import Job
from launch.naming import digest, resource_name
from launch.options import option, parse_secrets, require_python, require_words
from launch.plans import File, Plan, SlicePlan
from launch.shares import Share, deal
from moe_jax.errors import FieldError, require

LABEL = "moe-jax"  # on every resource we create; its value identifies --out and experiment
_QUEUED = ("gcloud", "compute", "tpus", "queued-resources")
_CAPACITY = {"spot": ("--spot",), "on-demand": (), "reserved": ("--reserved",)}
_DURATION = re.compile(r"([0-9]{1,5}[smhd]){1,4}")


@dataclasses.dataclass(frozen=True)
class Options(tpu.OnSlices):
  """Flags of this backend; see each field's help."""

  project: str = option("Google Cloud project to use and bill.")
  zones: tuple[str, ...] = option("Zones to try, in this order, e.g. us-east5-b,europe-west4-a.")
  topology: str = option("TPU slice, as gcloud names it, e.g. v6e-16 or v5p-64.")
  slices: int = option("Number of slices to distribute the cells over.", default=1)
  slices_per_run: int = option("Slices per run, joined by the data-center network.", default=1)
  capacity: Literal["spot", "on-demand", "reserved"] = option(
      "spot, on-demand or reserved.", default="spot")
  runtime_version: str | None = option(
      "TPU VM image; by default the chip's standard one.", default=None)
  network: str | None = option("VPC network.", default=None)
  subnetwork: str | None = option("Subnetwork.", default=None)
  service_account: str | None = option("Service account of the TPU VMs.", default=None)
  internal_ips: bool = option("true: the TPU VMs have no public addresses.", default=False)
  valid_until: str | None = option(
      "How long a request may wait for capacity, e.g. 6h; after that it fails and is "
      "retried in the next zone.", default=None)
  delete_when_done: bool = option(
      "true: a slice deletes itself when its cells are finished, even without a launcher.",
      default=True)
  python: str | None = option(
      "Interpreter on the TPU VMs that has all dependencies; by default, the dependencies are "
      "installed from the lock file.", default=None)
  max_cost_usd: float | None = money.MAX_COST_OPTION
  usd_per_chip_hour: float | None = money.PRICE_OPTION
  secrets: tuple[str, ...] = option(
      "Environment variables of the trainer: NAME=projects/P/secrets/S/versions/latest or "
      "NAME=/file/on/the/machine.", default=())

  def __post_init__(self):
    require_words(self, "project", "runtime_version", "network", "subnetwork",
                  "service_account")
    require(len(self.zones) > 0, "zones", "", "must name at least one")
    for zone in self.zones:
      tpu.require_zone(zone)
    require(self.slices >= 1, "slices", self.slices, "must be at least 1")
    if self.topology.startswith("tpu7x"):
      raise FieldError("topology", self.topology, "is not available as a queued resource; "
                       "use --backend=gke")
    require(self.valid_until is None or _DURATION.fullmatch(self.valid_until) is not None,
            "valid_until", self.valid_until, "must be a duration such as 6h or 1h30m")
    require_python(self.python)
    parse_secrets(self.secrets)
    money.require_money(self.usd_per_chip_hour, self.max_cost_usd, self.slice.topology)
    require(self.delete_when_done or self.max_cost_usd is None, "delete_when_done", False,
            "contradicts --max_cost_usd: without a live launcher, a finished slice would keep "
            "incurring cost")


def plan(jobs: Sequence[Job], options: Options, code: Code, out: str) -> Plan:
  """Returns what submitting the jobs would write and run, with each slice in the first zone."""
  shares = deal(jobs, options.slices)
  experiment = jobs[0].cell.experiment
  found = tuple(_slice_plan(share, options, code, out) for share in shares)
  return Plan("gcloud", experiment, f"{out}/{experiment}/_slices", found)


def _slice_plan(share: Share, options: Options, code: Code, out: str) -> SlicePlan:
  """Returns a slice's files, with one start-up script per zone, and the first zone's command."""
  secrets = parse_secrets(options.secrets)
  todo = work.work_of(share, code, out, "gcloud", options.hosts, secrets, options.usd_per_second)
  scripts = (File(f"{share.name}/startup-{zone}.sh",
                  startup_script(share.name, options, code, out, todo.experiment, zone))
             for zone in dict.fromkeys(options.zones))
  return SlicePlan(
      share.name, tuple(todo.cells),
      (File(f"{share.name}/work.json", work.to_text(todo)), *scripts),
      (create(share.name, options, options.zones[0], owner(out, todo.experiment)),))


def owner(out: str, experiment: str) -> str:
  """Returns the label value shared by all resources of one experiment's directory."""
  return resource_name(experiment, 40) + "-" + digest(out, experiment)


def create(name: str, options: Options, zone: str, label: str) -> tuple[str, ...]:
  """Returns the command that requests a slice. `{slices}` stands for the `_slices` folder."""
  version = options.runtime_version or tpu.RUNTIMES[options.slice.topology.hardware.name]
  nodes = ((f"--node-id={name}",) if options.slices_per_run == 1 else
           (f"--node-count={options.slices_per_run}", f"--node-prefix={name}"))
  optional = {"--network": options.network, "--subnetwork": options.subnetwork,
              "--service-account": options.service_account,
              "--valid-until-duration": options.valid_until}
  return (*_QUEUED, "create", name, *_where(options, zone),
          f"--accelerator-type={options.topology}", f"--runtime-version={version}", *nodes,
          *_CAPACITY[options.capacity], f"--labels={LABEL}={label}",
          f"--metadata-from-file=startup-script={{slices}}/{name}/startup-{zone}.sh",
          *(f"{flag}={value}" for flag, value in optional.items() if value is not None),
          *(("--internal-ips",) if options.internal_ips else ()), "--async", "--quiet")


def describe(name: str, options: Options, zone: str) -> tuple[str, ...]:
  return (*_QUEUED, "describe", name, *_where(options, zone), "--format=json")


def delete(name: str, options: Options, zone: str) -> tuple[str, ...]:
  """Returns the command that deletes the resource and its nodes, whatever their state."""
  return (*_QUEUED, "delete", name, *_where(options, zone), "--force", "--async", "--quiet")


def list_all(options: Options, zone: str) -> tuple[str, ...]:
  """Returns the command that lists all queued resources of a zone; ours carry LABEL."""
  return (*_QUEUED, "list", *_where(options, zone), "--format=json")


def ssh(name: str, options: Options, zone: str, command: str, worker: str) -> tuple[str, ...]:
  """Returns the line that runs `command` on workers of all nodes; `worker`: a number or `all`."""
  return (*_QUEUED, "ssh", name, *_where(options, zone), "--node=all", f"--worker={worker}",
          f"--command={command}", *(("--internal-ip",) if options.internal_ips else ()),
          "--quiet")


def accelerator(options: Options, zone: str) -> tuple[str, ...]:
  """Returns a command that succeeds if the zone has the accelerator and the account has access."""
  return ("gcloud", "compute", "tpus", "accelerator-types", "describe", options.topology,
          *_where(options, zone), "--format=json")


def bucket(options: Options, name: str) -> tuple[str, ...]:
  """Returns the command that describes a bucket, including its location."""
  return ("gcloud", "storage", "buckets", "describe", f"gs://{name}",
          f"--project={options.project}", "--format=json")


def _where(options: Options, zone: str) -> tuple[str, ...]:
  return f"--project={options.project}", f"--zone={zone}"


def startup_script(name: str, options: Options, code: Code, out: str, experiment: str,
                   zone: str) -> str:
  """Returns `launch/host/startup.sh` with this slice's values filled in, each shell-quoted."""
  slices = f"{out}/{experiment}/_slices"
  ending = delete(name, options, zone) if options.delete_when_done else ()
  values = {
      "CODE": (f"{out}/_code/{code.file_name}",), "SHA256": (code.sha256,),
      "WORK": (f"{slices}/{name}/work.json",), "PYTHON": (options.python or "",),
      "DELETE": ending, "LIMIT": (f"{slices}/{budget.LIMIT}",),
      "USD": ("null" if options.max_cost_usd is None else str(options.max_cost_usd),),
      "SLICES": (str(options.slices),), "RATE": (str(options.usd_per_second),),
      "MARGIN": (f"{budget.MARGIN_SECONDS:.0f}",)}
  text = resources.files("launch.host").joinpath("startup.sh").read_text()
  return re.sub(r"@([A-Z0-9]+)@", lambda found: shlex.join(values[found[1]]), text)


def submit(planned: Plan, jobs: Sequence[Job], options: Options, code: Code, out: str,
           run: remote.Run = remote.run) -> int:
  """Records the wanted slices and drives them until all have ended.

  Returns:
    The launcher's exit code.
  """
  from launch import driver, lease  # here, since driver imports this module
  error = driver.preflight(options, out, run)
  if error is not None:
    print(f"nothing was created: {error}")
    return 1
  remote.upload(code, out)
  try:
    driver.want(planned, jobs, options, out)
  except lease.Held as held:
    print(f"nothing was submitted: {held}")
    return 1
  return driver.drive(epath.Path(planned.out), run)
