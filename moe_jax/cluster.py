"""Where a run's other processes are: from flags, or from what the environment shows. No JAX.

JAX itself finds the addresses on Cloud TPU, GKE and SLURM; here it is only decided whether it
is asked to. It must not be on a laptop, where asking means waiting for a server that is not there.
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
  """What jax.distributed.initialize is to be given; None for a process that is alone.

  Args:
    coordinator_address: host:port of process 0; the three are given together, or none. Of
      them `num_processes` = 1 may stand alone: then nothing is looked for.
    num_processes: of the run.
    process_id: of this process, from 0.
    environ: os.environ.
    devices: the folder in which TPU chips appear.

  Raises:
    FieldError: the flags do not go together, or SLURM would leave GPUs idle.
  """
  given = dict(zip(_FLAGS, (coordinator_address, num_processes, process_id), strict=True))
  if all(value is None for value in given.values()):
    return {} if find(environ, devices) else None
  if num_processes == 1 and (process_id or 0) == 0:
    return None
  for name, value in given.items():
    require(value is not None, name, "", "is needed too: --coordinator_address=HOST:PORT, "
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
  """The kind of cluster in which this process may have others beside it, or None.

  Raises:
    FieldError: SLURM gave this process fewer GPUs than are meant for it.
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
  """Whether this process surely has others beside it, for commands that want to be alone.

  On Cloud TPU the environment does not show it and JAX is asked, which takes the chips.
  """
  kind = find(environ)
  if kind == "Cloud TPU":
    import jax
    return jax.process_count() > 1
  return kind in ("SLURM", "GKE")


def _has_tpu(devices: pathlib.Path) -> bool:
  return any(devices.glob("accel[0-9]*")) or any(devices.glob("vfio/[0-9]*"))


def _require_a_task_for_each_gpu(environ: Mapping[str, str]) -> None:
  """JAX gives each task of a node one GPU, by its number there: the rest would idle unseen."""
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
  """From SLURM's short form of a list: `4(x2),3` is 4, 4, 3."""
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
  """The environment of one of so many processes that share this machine's GPUs.

  Each takes its share of the memory beforehand; alone, JAX would take three quarters. What the user
  has said of it stands, by whichever of the two names: with both JAX gives up on the GPU.
  """
  if {"XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"} & set(environ):
    return dict(environ)
  return {**environ, "XLA_PYTHON_CLIENT_MEM_FRACTION": f"{0.9 / parallel:.2f}"}
