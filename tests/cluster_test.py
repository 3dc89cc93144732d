"""Whether a process has others, and where they are."""

import os
import subprocess
import sys

import pytest

from moe_jax.cluster import find, is_one_of_many, meeting, share_of_memory
from moe_jax.errors import FieldError
from tests.experiment_files import ROOT

SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_PROCID": "0",
         "SLURM_LOCALID": "0", "SLURM_NTASKS": "8"}


@pytest.fixture
def no_chips(tmp_path):
  return tmp_path


@pytest.fixture(params=["accel0", "vfio/0"])
def chips(request, tmp_path):
  (tmp_path / request.param).parent.mkdir(exist_ok=True)
  (tmp_path / request.param).touch()
  return tmp_path


@pytest.mark.parametrize("environ,kind", [
    ({}, None),
    (SLURM, "SLURM"),
    (SLURM | {"SLURM_NTASKS": "1"}, None),
    ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"}, None),  # in a batch script, without srun
    ({"TPU_WORKER_HOSTNAMES": "a,b"}, "GKE"),
    ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
    ({"TPU_WORKER_HOSTNAMES": "localhost", "MEGASCALE_NUM_SLICES": "2"}, "GKE"),
    ({"TPU_PROCESS_ADDRESSES": "a:1,b:1", "JAX_PLATFORMS": "tpu,cpu"}, "GKE"),
    ({"TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": "cpu"}, None),
    ({"KUBERNETES_SERVICE_HOST": "h", "JOB_COMPLETION_INDEX": "1"}, "Kubernetes"),
    ({"KUBERNETES_SERVICE_HOST": "h"}, None),
])
def test_the_environment_shows_a_cluster(environ, kind, no_chips):
  assert find(environ, no_chips) == kind
  assert meeting(None, None, None, environ, no_chips) == (None if kind is None else {})


def test_a_command_that_wants_to_be_alone_is_told():
  assert is_one_of_many(SLURM)
  assert not is_one_of_many(SLURM | {"SLURM_NTASKS": "1"})
  assert not is_one_of_many({})


def test_evaluation_is_refused_as_one_of_many():
  environ = os.environ | SLURM
  done = subprocess.run([sys.executable, "-m", "moe_jax.evaluate",
                         "--config=experiments/quickstart.py"], cwd=ROOT, env=environ, text=True,
                        capture_output=True)
  assert done.returncode == 2
  assert "evaluation runs in a single process" in done.stderr and done.stderr.count("\n") == 1


def test_tpu_chips_are_a_reason_to_ask(chips):
  assert find({}, chips) == "Cloud TPU"
  assert find({"JAX_PLATFORMS": "cpu"}, chips) is None
  assert find({"TPU_SKIP_MDS_QUERY": "1"}, chips) is None
  assert find({"TPU_WORKER_HOSTNAMES": "localhost"}, chips) is None


def test_flags_are_passed_on_and_nothing_else_is_looked_for(no_chips):
  assert meeting("h:12", 4, 3, SLURM, no_chips) == {
      "coordinator_address": "h:12", "num_processes": 4, "process_id": 3,
      "cluster_detection_method": "deactivate"}
  assert meeting(None, 1, None, SLURM, no_chips) is None
  assert meeting("h:12", 1, 0, {}, no_chips) is None


@pytest.mark.parametrize("flags,line", [
    (("h:12", None, None), "num_processes='': is required too"),
    ((None, 2, 0), "coordinator_address='': is required too"),
    (("h:12", 2, None), "process_id='': is required too"),
    (("h:12", 0, 0), "num_processes=0: must be at least 1"),
    (("h:12", 2, 2), "process_id=2: must be at least 0 and below num_processes, which is 2"),
    (("h:12", 2, -1), "process_id=-1: "),
    (("h", 2, 0), "coordinator_address='h': must be HOST:PORT"),
    (("h:0", 2, 0), "coordinator_address='h:0': "),
    (("h:70000", 2, 0), "coordinator_address='h:70000': "),
])
def test_flags_that_do_not_go_together_are_refused(flags, line, no_chips):
  with pytest.raises(FieldError) as refused:
    meeting(*flags, {}, no_chips)
  assert str(refused.value).startswith(line)


def test_slurm_must_not_leave_gpus_idle():
  one_a_node = SLURM | {"SLURM_NTASKS": "2", "SLURM_GPUS_ON_NODE": "8",
                        "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
  with pytest.raises(FieldError, match=r"1 task\(s\) on this node of 8 GPUs.*7 would idle"):
    find(one_a_node)
  assert find(one_a_node | {"JAX_PLATFORMS": "cpu"}) == "SLURM"
  assert find(one_a_node | {"SLURM_STEP_TASKS_PER_NODE": "8(x2)"}) == "SLURM"
  uneven = one_a_node | {"SLURM_STEP_TASKS_PER_NODE": "8,4"}
  assert find(uneven | {"SLURM_NODEID": "0"}) == "SLURM"
  with pytest.raises(FieldError, match="4 would idle"):
    find(uneven | {"SLURM_NODEID": "1"})
  with pytest.raises(FieldError, match="gpus-per-task hides"):
    find(SLURM | {"SLURM_GPUS_PER_TASK": "1"})


@pytest.mark.parametrize("environ, parallel, fraction", [
    ({}, 1, {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.90"}),
    ({}, 3, {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.30"}),
    ({"XLA_CLIENT_MEM_FRACTION": "0.5"}, 3, {}), ({"XLA_PYTHON_CLIENT_MEM_FRACTION": ".2"}, 3, {})])
def test_who_shares_a_gpu_gets_a_part_unless_the_user_says_which(environ, parallel, fraction):
  """With both names set JAX raises in its plug-in, and goes on without the GPU."""
  assert share_of_memory(environ, parallel) == {**environ, **fraction}
