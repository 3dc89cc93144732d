"""What is sent to clouds is what they accept: gcloud's own parser, and schemas of manifests."""

import functools
import json
import pathlib
import re
import subprocess

import pytest
from hypothesis import given, settings

from launch import slices, tpu
from launch.backends import gcloud, gke, slurm
from launch.code import Code
from launch.host import machine
from launch.jobs import jobs_of
from launch.plans import with_folder
from moe_jax.grid import select
from tests.experiment_files import write_tiny
from tests.launch import fake_gcloud, gcloud_parser
from tests.launch.fake_cloud import Resource
from tests.launch.plan_options import GCLOUD, GKE, SLURM

_CODE = Code("0123456789ab+", "a" * 64, "experiments/tiny.py", b"")
_SCHEMAS = pathlib.Path(__file__).with_name("schemas")
EXAMPLES = 12


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
  return jobs_of(select(write_tiny(tmp_path_factory.mktemp("grid"), seeds=5)), "/runs", [])


def _lines(options, jobs):
  """Every kind of command line that gcloud is given with these options."""
  planned = gcloud.plan(jobs, options, _CODE, "/runs")
  name, zone = planned.slices[0].name, options.zones[0]
  return [*(with_folder(command, "/tmp/files") for share in planned.slices[:1]
            for command in share.commands),
          gcloud.describe(name, options, zone), gcloud.delete(name, options, zone),
          gcloud.list_all(options, zone), gcloud.accelerator(options, zone),
          gcloud.bucket(options, "some-bucket"),
          gcloud.ssh(name, options, zone, "tail -n 5 'a b'; true", "all"),
          gcloud.ssh(name, options, zone, "date", "0"),
          # on the machines
          machine.secret_command("projects/p/secrets/s/versions/latest"),
          ("gcloud", "storage", "cp", "gs://some-bucket/code.tar.gz", "/tmp/files/code.tar.gz")]


def test_gcloud_accepts_every_command_line(jobs, tmp_path):
  if gcloud_parser.sdk() is None:
    pytest.skip("no gcloud here: its parser cannot be asked (install google-cloud-cli)")
  lines = []

  @settings(max_examples=EXAMPLES, deadline=None, database=None)
  @given(GCLOUD)
  def collect(options):
    lines.extend(_lines(options, jobs))

  collect()
  (tmp_path / "files").mkdir()
  startup = tmp_path / "files" / "startup.sh"
  startup.write_text("#!/bin/bash\n")
  # gcloud reads the script while it parses: any file will do
  lines = [tuple(argument if "startup-script=" not in argument else
                 f"--metadata-from-file=startup-script={startup}" for argument in line)
           for line in lines]
  assert gcloud_parser.refused(sorted(set(lines)), tmp_path) == []


def test_gclouds_parser_does_refuse(tmp_path, jobs):
  if gcloud_parser.sdk() is None:
    pytest.skip("no gcloud here: its parser cannot be asked (install google-cloud-cli)")
  options = gcloud.Options("p", ("us-east5-b",), "v6e-8")
  good = gcloud.describe("a", options, "us-east5-b")
  assert gcloud_parser.refused([good], tmp_path) == []
  assert "unrecognized" in gcloud_parser.refused([(*good, "--provisioning-model=x")], tmp_path)[0]


def test_the_fakes_speak_the_sdks_messages(tmp_path, capsys):
  """Every state, initiator and error that the fake cloud and the fake gcloud tell."""
  if gcloud_parser.sdk() is None:
    pytest.skip("no gcloud here: its messages cannot be asked (install google-cloud-cli)")
  told = []
  for state in ("ACCEPTED", *slices._BEFORE, *slices._HELD, *slices._AFTER, "DELETING"):
    for who in (None, "USER", "SERVICE"):
      event = (0.0, state, who, "no capacity" if state == "FAILED" else None)
      told.append(Resource("a", "us-east5-b", "p", {"moe-jax": "x"}, 0.0, [event]).message(1.0))
  for state in (*fake_gcloud._STATES, "SUSPENDED"):
    cloud = {"created": 1, "resources": {"a": {"zone": "z", "state": state, "labels": {"k": "v"},
                                               "home": None, "script": "", "n": 2}}}
    assert fake_gcloud._answer(tmp_path, cloud, "describe", "a", {"--zone": "z"}) == 0
    told.append(json.loads(capsys.readouterr().out))
  assert gcloud_parser.unknown_fields(told, tmp_path) == [[]] * len(told)
  told[0]["state"] = {"state": "PREEMPTED", "since": 3}
  (unknown,) = gcloud_parser.unknown_fields(told[:1], tmp_path)
  assert sorted(unknown) == ["state.since", "state.state"]


# As Google's pages have them: "TPU software versions", and "Plan TPUs in GKE".
RUNTIMES = {"v4": "tpu-ubuntu2204-base", "v5litepod": "v2-alpha-tpuv5-lite",
            "v5p": "v2-alpha-tpuv5", "v6e": "v2-alpha-tpuv6e"}
GKE_ACCELERATORS = {"v4": "tpu-v4-podslice", "v5litepod": "tpu-v5-lite-podslice",
                    "v5p": "tpu-v5p-slice", "v6e": "tpu-v6e-slice", "tpu7x": "tpu7x"}
GKE_TOPOLOGIES = {"v4-8": "2x2x1", "v5litepod-16": "4x4", "v5p-64": "2x4x4", "v6e-1": "1x1",
                  "v6e-8": "2x4", "v6e-256": "16x16", "tpu7x-64": "2x4x4"}


@pytest.mark.parametrize("ours, theirs", [
    (tpu.RUNTIMES, RUNTIMES), (tpu.GKE_ACCELERATORS, GKE_ACCELERATORS)])
def test_the_tables_of_chips_are_those_of_the_pages(ours, theirs):
  named = {"v5litepod": "v5e"}  # in accelerator types
  assert ours == {named.get(chip, chip): name for chip, name in theirs.items()}


# Flags per command as gcloud 528 documents them, for machines without gcloud.
_CREATE = {"--project", "--zone", "--accelerator-type", "--runtime-version", "--node-id",
           "--node-count", "--node-prefix", "--spot", "--reserved", "--labels",
           "--metadata-from-file", "--network", "--subnetwork", "--service-account",
           "--valid-until-duration", "--internal-ips", "--async", "--quiet"}
_FLAGS = {"create": _CREATE, "describe": {"--project", "--zone", "--format"},
          "delete": {"--project", "--zone", "--force", "--async", "--quiet"},
          "list": {"--project", "--zone", "--format"},
          "ssh": {"--project", "--zone", "--node", "--worker", "--command", "--internal-ip",
                  "--quiet"}}


@settings(max_examples=60, deadline=None)
@given(options=GCLOUD)
def test_queued_resources_get_only_their_ga_flags(options, jobs):
  found = [line for line in _lines(options, jobs)
           if line[:4] == ("gcloud", "compute", "tpus", "queued-resources")]
  assert {line[4] for line in found} == _FLAGS.keys()
  for line in found:
    flags = {word.partition("=")[0] for word in line if word.startswith("--")}
    assert flags <= _FLAGS[line[4]]


@settings(max_examples=60, deadline=None)
@given(options=GCLOUD)
def test_a_queued_resource_is_asked_for_as_the_options_say(options, jobs):
  shares = gcloud.plan(jobs, options, _CODE, "/runs").slices
  creates = [command for share in shares for command in share.commands if "create" in command]
  assert len(creates) == len(shares) == min(options.slices, len(jobs))
  chosen = {"--network": options.network, "--subnetwork": options.subnetwork,
            "--service-account": options.service_account,
            "--valid-until-duration": options.valid_until, "--project": options.project,
            "--zone": options.zones[0], "--accelerator-type": options.topology}
  for line in creates:
    assert [word for word in ("--spot", "--reserved") if word in line] == {
        "spot": ["--spot"], "reserved": ["--reserved"], "on-demand": []}[options.capacity]
    assert ("--internal-ips" in line) == options.internal_ips
    given_to = dict(word.split("=", 1) for word in line if "=" in word)
    assert {flag: given_to.get(flag) for flag in chosen} == chosen
    assert given_to["--runtime-version"] == (options.runtime_version or RUNTIMES[
        options.topology.partition("-")[0]])
    nodes = {flag: value for flag, value in given_to.items() if flag.startswith("--node-")}
    name = line[5]
    assert nodes == ({"--node-id": name} if options.slices_per_run == 1 else {
        "--node-count": str(options.slices_per_run), "--node-prefix": name})


# kubectl


@functools.cache
def _validator():
  """Validates of the manifests, kept small: the fields that this project may set, and no more."""
  jsonschema = pytest.importorskip("jsonschema", reason="pip install jsonschema")
  schema = json.loads((_SCHEMAS / "jobset.json").read_text())
  jsonschema.Draft202012Validator.check_schema(schema)
  return jsonschema.Draft202012Validator(schema)


@settings(max_examples=60, deadline=None)
@given(options=GKE)
def test_every_manifest_is_valid(options, jobs):
  shares = gke.plan(jobs, options, _CODE, "gs://bucket/runs").slices
  assert len(shares) == min(options.slices, len(jobs))
  for share in shares:
    manifest = json.loads(share.files[1].text)
    assert [error.message for error in _validator().iter_errors(manifest)] == []
    (job,) = manifest["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    chips = spec["template"]["spec"]["containers"][0]["resources"]["limits"]["google.com/tpu"]
    assert job["replicas"] * spec["completions"] * chips == options.slice.topology.chips
    assert manifest["metadata"]["labels"].get("kueue.x-k8s.io/queue-name") == options.queue
    assert spec["template"]["spec"]["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator":
            GKE_ACCELERATORS[options.topology.partition("-")[0]],
        "cloud.google.com/gke-tpu-topology": GKE_TOPOLOGIES[options.topology],
        **({"cloud.google.com/gke-spot": "true"} if options.capacity == "spot" else {}),
        **({"cloud.google.com/reservation-name": "r1"} if options.capacity == "reserved" else {})}
    assert manifest["spec"]["failurePolicy"]["maxRestarts"] == options.max_restarts


def test_the_schema_does_refuse(jobs):
  options = gke.Options("v6e-16", "image:1")
  (share,) = gke.plan(jobs, options, _CODE, "gs://bucket/runs").slices
  for spoil in (lambda it: it["spec"].update(replicatedJob=[]),
                lambda it: it["metadata"].update(name="Not_A_Label"),
                lambda it: it["metadata"]["labels"].update({"kueue.x-k8s.io/queue-name": "a b"}),
                lambda it: it["spec"]["replicatedJobs"][0]["template"]["spec"].update(
                    backoffLimit="0")):
    manifest = json.loads(share.files[1].text)
    spoil(manifest)
    assert list(_validator().iter_errors(manifest))


# sbatch


@settings(max_examples=40, deadline=None)
@given(options=SLURM)
def test_an_sbatch_array_has_a_task_a_share(options, jobs):
  (array,) = slurm.plan(jobs, options, _CODE, "/runs").slices
  (command,) = array.commands
  tasks = len(array.files) - 1
  limit = "" if options.max_running is None else f"%{options.max_running}"
  assert f"--array=0-{tasks - 1}{limit}" in command
  given_to = dict(word.split("=", 1) for word in command if "=" in word)
  chosen = {"--gpus-per-node": str(options.gpus_per_node) if options.gpus_per_node else None,
            "--nodes": str(options.nodes), "--partition": options.partition,
            "--ntasks-per-node": str(options.gpus_per_node or options.tasks_per_node or 1),
            "--account": options.account, "--time": options.time}
  assert {flag: given_to.get(flag) for flag in chosen} == chosen
  assert sorted(array.cells) == sorted(job.name for job in jobs)
  assert "--requeue" in command and not any("gpus-per-task" in word for word in command)
  todo = json.loads(array.files[0].text)
  assert todo["hosts"] == options.nodes * (options.gpus_per_node or options.tasks_per_node or 1)


@pytest.mark.parametrize("text", [
    gcloud.startup_script("n", gcloud.Options("p", ("us-east5-b",), "v6e-8"), _CODE,
                          "/a $(b) 'c'", "e", "us-east5-b"),
    slurm.script("/a $(b) 'c'/_slices/x", slurm.Options(), _CODE, "/a $(b) 'c'")])
def test_scripts_are_bash(text):
  assert subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True).stderr == ""
  assert re.search("@[A-Z]", text) is None
