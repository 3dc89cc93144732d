"""Runs cells on TPU slices in GKE: one JobSet per share of the grid, applied with kubectl.

Kueue may queue the JobSets. Each VM of a slice runs one pod, from the image that
`launch/Dockerfile` builds: an interpreter, the locked dependencies and `boot.py`, which fetches
this submission's exact code. JobSet recreates all pods of a run when one ends early: without
limit after preemptions, and up to `max_restarts` times after program failures.
"""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any, Literal

from etils import epath

from launch import budget, money, remote, tpu, work
from launch.backends.gcloud import LABEL, owner
from launch.code import Code
from launch.jobs import Job
from launch.options import option, parse_secrets, require_words
from launch.plans import File, Plan, SlicePlan
from launch.shares import Share, deal
from moe_jax.errors import require
from moe_jax.run_dir import EXIT_PREEMPTED


@dataclasses.dataclass(frozen=True)
class Options(tpu.OnSlices):
  """Flags of this backend; see each field's help."""

  topology: str = option("TPU slice, e.g. v6e-16 or tpu7x-64.")
  image: str = option("Container image built from launch/Dockerfile, with its tag or digest.")
  slices: int = option("Number of slices to distribute the cells over.", default=1)
  slices_per_run: int = option("Slices per run, joined by the data-center network.", default=1)
  capacity: Literal["spot", "on-demand", "reserved"] = option(
      "spot, on-demand or reserved.", default="spot")
  reservation: str | None = option("Name of the reservation.", default=None)
  queue: str | None = option("Kueue local queue.", default=None)
  namespace: str = option("Kubernetes namespace.", default="default")
  kube_context: str | None = option("kubectl context; by default the current one.",
                                    default=None)
  max_restarts: int = option("How often a run's pods may restart after program failures.",
                             default=3)
  max_cost_usd: float | None = money.MAX_COST_OPTION
  usd_per_chip_hour: float | None = money.PRICE_OPTION
  secrets: tuple[str, ...] = option("Environment variables of the trainer: "
                                    "NAME=kubernetes/SECRET/KEY.", default=())

  def __post_init__(self):
    require_words(self, "image", "reservation", "queue", "namespace", "kube_context")
    require(self.slices >= 1, "slices", self.slices, "must be at least 1")
    require(self.max_restarts >= 0, "max_restarts", self.max_restarts, "must be at least 0")
    require((self.reservation is not None) == (self.capacity == "reserved"), "reservation",
            self.reservation, "must be given with --capacity=reserved, and only then")
    parse_secrets(self.secrets, kubernetes=True)
    money.require_money(self.usd_per_chip_hour, self.max_cost_usd, self.slice.topology)


def plan(jobs: Sequence[Job], options: Options, code: Code, out: str) -> Plan:
  """Returns what submitting the jobs would write and run."""
  shares = deal(jobs, options.slices)
  experiment = jobs[0].cell.experiment
  return Plan("gke", experiment, f"{out}/{experiment}/_slices",
              tuple(_slice_plan(share, options, code, out) for share in shares))


def _slice_plan(share: Share, options: Options, code: Code, out: str) -> SlicePlan:
  todo = work.work_of(share, code, out, "gke", options.hosts,
                      usd_per_second=options.usd_per_second)
  manifest = json.dumps(jobset(share.name, options, code, out, todo.experiment), indent=1)
  return SlicePlan(
      share.name, tuple(todo.cells),
      (File(f"{share.name}/work.json", work.to_text(todo)),
       File(f"{share.name}/jobset.json", manifest + "\n")),
      (kubectl(options, "apply", f"--filename={{slices}}/{share.name}/jobset.json"),))


def kubectl(options: Options, *arguments: str) -> tuple[str, ...]:
  return kubectl_in(options.namespace, options.kube_context, *arguments)


def kubectl_in(namespace: str, context: str | None, *arguments: str) -> tuple[str, ...]:
  chosen = () if context is None else (f"--context={context}",)
  return ("kubectl", *chosen, f"--namespace={namespace}", *arguments)


def jobset(name: str, options: Options, code: Code, out: str, experiment: str) -> dict[str, Any]:
  """Returns the JobSet of one share (jobset.x-k8s.io/v1alpha2)."""
  labels = {LABEL: owner(out, experiment)}
  queue = {} if options.queue is None else {"kueue.x-k8s.io/queue-name": options.queue}
  return {
      "apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet",
      "metadata": {
          "name": name, "namespace": options.namespace, "labels": labels | queue,
          # A slice is one node pool, which pods of two runs never share.
          "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology":
                          "cloud.google.com/gke-nodepool"}},
      "spec": {
          "failurePolicy": {
              "maxRestarts": options.max_restarts,
              "rules": [{"name": "taken-away", "action": "RestartJobSetAndIgnoreMaxRestarts",
                         "onJobFailureReasons": ["PodFailurePolicy"]}]},
          "replicatedJobs": [{
              "name": "slice", "replicas": options.slices_per_run,
              "template": {"spec": _job(name, options, code, out, experiment, labels)}}]}}


def _job(name: str, options: Options, code: Code, out: str, experiment: str,
         labels: dict[str, str]) -> dict[str, Any]:
  return {
      "parallelism": options.slice.vms, "completions": options.slice.vms, "backoffLimit": 0,
      # A drained or preempted node, or a trainer told to stop, does not count as a failure.
      "podFailurePolicy": {"rules": [
          {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget",
                                                     "status": "True"}]},
          {"action": "FailJob", "onExitCodes": {"containerName": "trainer", "operator": "In",
                                                "values": [EXIT_PREEMPTED]}}]},
      "template": {
          "metadata": {"labels": labels},
          "spec": {
              "restartPolicy": "Never", "terminationGracePeriodSeconds": 120,
              "nodeSelector": _node_selector(options),
              "hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet",
              "containers": [_container(name, options, code, out, experiment)]}}}


def _node_selector(options: Options) -> dict[str, str]:
  chosen = {
      "cloud.google.com/gke-tpu-accelerator":
          tpu.GKE_ACCELERATORS[options.slice.topology.hardware.name],
      "cloud.google.com/gke-tpu-topology": options.slice.gke_topology}
  if options.capacity == "spot":
    chosen["cloud.google.com/gke-spot"] = "true"
  if options.reservation is not None:
    chosen["cloud.google.com/reservation-name"] = options.reservation
  return chosen


def _container(name: str, options: Options, code: Code, out: str,
               experiment: str) -> dict[str, Any]:
  secrets = parse_secrets(options.secrets, kubernetes=True)
  env = [{"name": variable, "valueFrom": {"fieldRef": {
      "fieldPath": f"metadata.labels['jobset.sigs.k8s.io/{label}']"}}}
         for variable, label in (("MOE_JAX_SLICE", "job-index"),
                                 ("MOE_JAX_RESTART", "restart-attempt"))]
  for variable, where in secrets.items():
    _, secret, key = where.split("/")
    env.append({"name": variable,
                "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}})
  return {
      "name": "trainer", "image": options.image,
      "command": ["python", "/opt/moe_jax/boot.py", f"--code={out}/_code/{code.file_name}",
                  f"--sha256={code.sha256}", "--", "-m", "launch.host",
                  f"--work={out}/{experiment}/_slices/{name}/work.json"],
      "env": env, "ports": [{"containerPort": 8471}, {"containerPort": 8080}],
      "resources": {"limits": {"google.com/tpu": options.slice.chips_per_vm}}}


def submit(planned: Plan, jobs: Sequence[Job], options: Options, code: Code, out: str,
           run: remote.Run = remote.run) -> int:
  """Applies the JobSets that are missing or left cells unfinished. Returns the exit code."""
  if (error := remote.why_not_writable(out) or _why_not_allowed(options, run)) is not None:
    print(f"nothing was applied: {error}")
    return 1
  remote.upload(code, out)
  budget.set_limit(epath.Path(planned.out), options.max_cost_usd)
  told = [_apply(planned, share, jobs, options, run) for share in planned.slices]
  for share, (_, line) in zip(planned.slices, told, strict=True):
    print(f"{share.name} {line}")
  return 0 if all(good for good, _ in told) else 1


def _why_not_allowed(options: Options, run: remote.Run) -> str | None:
  answer = run(kubectl(options, "auth", "can-i", "create", "jobsets.jobset.x-k8s.io"))
  return None if answer.ok else (
      f"kubectl may not create JobSets in namespace {options.namespace}: {answer.error}")


def _apply(planned: Plan, share: SlicePlan, jobs: Sequence[Job], options: Options,
           run: remote.Run) -> tuple[bool, str]:
  """Applies a JobSet that is missing, and recreates one that has ended with cells left.

  Returns:
    (whether it is in place, a phrase that says what was done).
  """
  answer = run(kubectl(options, "get", "jobset", share.name, "--ignore-not-found",
                       "--output=jsonpath={.metadata.name} {.status.terminalState}"))
  match answer.stdout.split() if answer.ok else None:
    case [_]:
      return True, "already exists"
    case [_, ended]:
      if all(job.is_finished() for job in jobs if job.name in share.cells):
        return True, "is done"
      answer = run(kubectl(options, "delete", "jobset", share.name, "--ignore-not-found"))
      print(f"{share.name} has ended ({ended}) with unfinished cells; recreating it")
  if not answer.ok:
    return False, f"was not applied: {answer.error}"
  remote.begin_anew(planned, share, jobs)
  remote.write_files(planned, share)
  error = remote.execute(share, run)
  return error is None, f"was not applied: {error}" if error else "was applied"
