"""Detects whether a run has several processes, from flags or the environment. No JAX.

JAX itself finds the addresses on Cloud TPU, GKE and SLURM; this module only decides whether to ask
it to. On a laptop it must not be asked, since it would wait for a server that does not exist.
"""

import pathlib
import re
from collections.abc import Mapping
from typing import Any

from moe_jax.errors import FieldError, require

_FLAGS = ("coordinator_address", "num_processes", "process_id")


def meeting(coordinator_address: str | None, num_processes: int | None,
            process_id: int | None, environ: Mapping[str, str],
            devices: pathlib.Path = pathlib.Path("/dev")) -> dict[str, Any] | None:
  """The arguments for jax.distributed.initialize; None for a single process.

  Args:
    coordinator_address: host:port of process 0. The three flags are given together or not at all,
      except that `num_processes` = 1 may be given alone: then no others are looked for.
    num_processes: number of processes of the run.
    process_id: index of this process, from 0.
    environ: os.environ.
    devices: the folder in which TPU chips appear.

  Raises:
    FieldError: the flags are inconsistent, or SLURM would leave GPUs idle.
  """
  given = dict(zip(_FLAGS, (coordinator_address, num_processes, process_id), strict=True))
  if all(value is None for value in given.values()):
    return {} if find(environ, devices) else None
  if num_processes == 1 and (process_id or 0) == 0:
    return None
  for name, value in given.items():
    require(value is not None, name, "", "is required too: --coordinator_address=HOST:PORT, "
            "--num_processes=N and --process_id=I are given together")
  require(num_processes >= 1, "num_processes", num_processes, "must be at least 1")
  require(0 <= process_id < num_processes, "process_id", process_id,
          f"must be at least 0 and below num_processes, which is {num_processes}")
  require(re.fullmatch(r".+:[0-9]{1,5}", coordinator_address) is not None
          and 0 < int(coordinator_address.rpartition(":")[2]) < 2**16,
          "coordinator_address", coordinator_address, "must be HOST:PORT of process 0")
  return given | {"cluster_detection_method": "deactivate"}


def find(environ: Mapping[str, str], devices: pathlib.Path = pathlib.Path("/dev")
         ) -> str | None:
  """The kind of cluster in which this process may be one of several, or None.

  Raises:
    FieldError: SLURM started fewer tasks on this node than it has GPUs, or uses --gpus-per-task.
  """
  platforms = environ.get("JAX_PLATFORMS", "")
  if all(name in environ for name in ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID",
                                      "SLURM_LOCALID")):
    if _integer(environ, "SLURM_NTASKS", 1) > 1:
      if platforms != "cpu":
        _require_a_task_for_each_gpu(environ)
      return "SLURM"
    return None
  if not platforms or "tpu" in platforms:
    hosts = environ.get("TPU_PROCESS_ADDRESSES", environ.get("TPU_WORKER_HOSTNAMES"))
    if hosts is not None:  # GKE
      slices = _integer(environ, "MEGASCALE_NUM_SLICES", 1)
      return "GKE" if "," in hosts or slices > 1 else None
    if "TPU_SKIP_MDS_QUERY" not in environ and _has_tpu(devices):
      return "Cloud TPU"
  if "KUBERNETES_SERVICE_HOST" in environ and "JOB_COMPLETION_INDEX" in environ:
    return "Kubernetes"
  return None


def is_one_of_many(environ: Mapping[str, str]) -> bool:
  """Whether this process is certainly one of several, for commands that must run alone.

  On Cloud TPU the environment does not show this, so JAX is asked, which acquires the chips.
  """
  kind = find(environ)
  if kind == "Cloud TPU":
    import jax
    return jax.process_count() > 1
  return kind in ("SLURM", "GKE")


def _has_tpu(devices: pathlib.Path) -> bool:
  return any(devices.glob("accel[0-9]*")) or any(devices.glob("vfio/[0-9]*"))


def _require_a_task_for_each_gpu(environ: Mapping[str, str]) -> None:
  """Raises FieldError if this node has more GPUs than tasks, or --gpus-per-task is used.

  JAX gives each task one GPU, by its local id, and the rest would silently idle.
  """
  advice = "ask for a task per GPU: srun --ntasks-per-node=GPUS --gpus-per-node=GPUS"
  if "SLURM_GPUS_PER_TASK" in environ:  # each task then sees a single GPU, numbered 0
    raise FieldError("num_processes", environ["SLURM_NTASKS"], "SLURM's --gpus-per-task hides "
                     f"from each task the GPUs of the others, which they need; {advice}")
  gpus = _integer(environ, "SLURM_GPUS_ON_NODE", 0)
  tasks = _tasks_on_node(environ)
  if tasks is not None and tasks < gpus:
    raise FieldError("num_processes", environ["SLURM_NTASKS"], f"SLURM starts {tasks} task(s) "
                     f"on this node of {gpus} GPUs, JAX gives each task one, and "
                     f"{gpus - tasks} would idle; {advice}")


def _tasks_on_node(environ: Mapping[str, str]) -> int | None:
  """Parses this node's entry of SLURM's compressed list: `4(x2),3` is 4, 4, 3."""
  short = environ.get("SLURM_STEP_TASKS_PER_NODE", environ.get("SLURM_TASKS_PER_NODE", ""))
  counts: list[int] = []
  for part in short.split(","):
    match = re.fullmatch(r"([0-9]+)(?:\(x([0-9]+)\))?", part.strip())
    if match is None:
      return None
    counts += [int(match[1])] * int(match[2] or 1)
  node = _integer(environ, "SLURM_NODEID", 0)
  return counts[node] if node < len(counts) else None


def _integer(environ: Mapping[str, str], name: str, default: int) -> int:
  text = environ.get(name, "")
  return int(text) if text.isdecimal() else default


def share_of_memory(environ: Mapping[str, str], parallel: int) -> dict[str, str]:
  """The environment for one of `parallel` processes that share this machine's GPUs.

  Each preallocates its share of the memory, where JAX would take three quarters by default. A value
  set by the user wins, under either of the two names: if both are set, JAX gives up on the GPU.
  """
  if {"XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"} & set(environ):
    return dict(environ)
  return {**environ, "XLA_PYTHON_CLIENT_MEM_FRACTION": f"{0.9 / parallel:.2f}"}
