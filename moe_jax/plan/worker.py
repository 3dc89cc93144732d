"""Worker process that compiles one train step for one TPU slice.

    python -m moe_jax.plan.worker REQUEST.json RESULT.json

It is a separate process because libtpu reads its environment once, holds a lock, and takes
gigabytes that are freed only when the process exits. `compilers.py` writes the request and reads
the result; if this process crashes, that costs one row of the table.
"""

import contextlib
import dataclasses
import gzip
import hashlib
import importlib.metadata
import json
import os
import pathlib
import re
import sys
import time
import zlib
from typing import Any

from etils import epath

from moe_jax import config as config_lib
from moe_jax.files import write_bytes
from moe_jax.plan import topology as topology_lib
from moe_jax.plan.topology import Topology

ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1",
               "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
               "TF_CPP_MIN_LOG_LEVEL": "3",
               "TPU_MIN_LOG_LEVEL": "3", "TPU_STDERR_LOG_LEVEL": "3"}

OUT_OF_MEMORY = ("the compiler ran out of this machine's memory, or was killed; fewer at once "
                 "(--parallel) or a larger machine may do")

# JAX variables that do not change the program: caches, logging, and the platform (set above).
_NOT_OF_THE_PROGRAM = "CACHE|LOG|TRACEBACK|DEBUG|PROFILE|EXPLAIN|^JAX_PLATFORMS$"

_RECORD = 2  # version of the cached record: bump it when its fields or their meaning change

# On real slices the two cores of a v4 chip are one JAX device; libtpu defaults to two here.
_CHIP_CONFIG = {"v4": {"chip_config_name": "megacore"}}


def main(request_path: str, result_path: str) -> None:
  request = json.loads(pathlib.Path(request_path).read_text())
  config = config_lib.config_from_dict(request["config"])
  topology = topology_lib.parse(request["topology"], request["slices"])
  try:
    result = compile_cell(config, topology, request["hlo"], request["programs"])
  except Exception as error:  # whatever went wrong, the parent shows one line per cell
    result = {"error": one_line(error)} | _memory_asked(str(error))
  write_bytes(epath.Path(result_path), json.dumps(result).encode())


def tpu_devices(topology: Topology) -> list:
  """Returns libtpu's descriptions of the devices of a slice that is not attached."""
  from jax.experimental import topologies
  name = f"{topology.hardware.name}:{'x'.join(map(str, topology.shape))}"
  options: dict[str, Any] = dict(_CHIP_CONFIG.get(topology.hardware.name, {}))
  if topology.n_slices > 1:
    options["num_slices"] = topology.n_slices
  if len(topology.shape) == 2 and topology.chips <= 8 * topology.n_slices:
    options["chips_per_host_bounds"] = (*topology.shape, 1)  # slices of up to 8 are one host
  return list(topologies.get_topology_desc(topology_name=name, platform="tpu",
                                           **options).devices)


def compile_cell(config: config_lib.RunConfig, topology: Topology, hlo_path: str | None,
                 programs: str | None = None) -> dict[str, Any]:
  """Compiles the step that `moe_jax.train` runs; returns its memory and cost as plain values.

  Args:
    config: the cell's configuration, including mesh and remat.
    topology: the slices to compile for.
    hlo_path: file for the HLO text; None does not write it.
    programs: folder that caches compiled programs; if code changes but the lowered program does
      not, it is not recompiled and only its cost is estimated again. None disables the cache.
  """
  from moe_jax.mesh import make_mesh
  from moe_jax.plan import cost, hlo, memory
  from moe_jax.plan.collectives import Devices
  from moe_jax.train.step import lower_train_step

  mesh = make_mesh(config, tpu_devices(topology))
  program = _compiled(lower_train_step(config, mesh), places_of(mesh), topology, programs)
  if "error" in program:
    return program
  if hlo_path:
    pathlib.Path(hlo_path).write_text(program["text"])
  module = hlo.parse(program["text"])
  step = cost.estimate(module, Devices.of(mesh), topology)
  return {
      "mesh": dict(mesh.shape), "compile_seconds": program["compile_seconds"],
      "memory": program["memory"],
      "seconds": step.seconds, "estimated_seconds": step.estimated_seconds,
      "priced_seconds": step.priced_seconds, "estimated_cycles": step.estimated_cycles,
      "flops": step.flops, "parts": step.by_part(),
      "collectives": [
          {"kind": kind, "axes": axes, "bytes": n_bytes, "exposed_seconds": exposed,
           "hidden_seconds": hidden}
          for (kind, axes), (n_bytes, exposed, hidden) in sorted(step.by_collective().items())],
      "dearest": [dataclasses.asdict(item) for item in
                  sorted(step.items, key=lambda item: -item.seconds)[:20]],
      "largest": [dataclasses.asdict(buffer) for buffer in memory.live_at_peak(module)[:20]],
  }


def places_of(mesh) -> list[tuple[int, ...]]:
  """Positions of the devices in mesh order, which the text of a program does not contain."""
  return [(getattr(device, "slice_index", 0), *getattr(device, "coords", (device.id,)),
           getattr(device, "core_on_chip", 0))
          for device in mesh.devices.flat]


def _compiled(lowered, places: list[tuple[int, ...]], topology: Topology,
              programs: str | None) -> dict[str, Any]:
  """Returns the compiled text, its memory and compile time, or the error; uses the cache."""
  kept = programs and epath.Path(programs) / f"{_program_key(lowered, places, topology)}.json.gz"
  if kept:
    # A missing or damaged entry is recompiled.
    with contextlib.suppress(OSError, EOFError, zlib.error, ValueError):
      return json.loads(gzip.decompress(kept.read_bytes()))
  began = time.monotonic()
  try:
    compiled = lowered.compile()
    program = {"memory": _memory(compiled.memory_analysis()), "text": compiled.as_text(),
               "compile_seconds": time.monotonic() - began}
  except Exception as error:  # usually too large, which is cached like a success
    program = {"error": one_line(error)} | _memory_asked(str(error))
  if kept and ("text" in program or "hbm_needed" in program):
    with contextlib.suppress(OSError):  # e.g. a full disk: the next plan recompiles
      write_bytes(kept, gzip.compress(json.dumps(program).encode()))
  return program


def _program_key(lowered, places: list[tuple[int, ...]], topology: Topology) -> str:
  """Cache key of a program: hash of its text, its devices, and the compiler's version and flags.

  Scopes are included because the cost model reads them; source lines are not.
  """
  from moe_jax.train.step import TPU_OPTIONS
  scopes = re.findall(r'loc\("([^"]+)"\(', lowered.as_text(debug_info=True))
  told = json.dumps([_RECORD, lowered.as_text(), scopes, topology.label, places, _CHIP_CONFIG,
                     TPU_OPTIONS, versions(), *compiler_flags()])
  return hashlib.sha256(told.encode()).hexdigest()[:20]


def _memory(stats) -> dict[str, int]:
  """Bytes on one device. Donated arguments are not counted twice.

  `peak` is the memory that is needed. The other values do not add up to it: XLA packs temporaries
  only as tightly as it has to, so even in a program that compiles their sum can exceed the limit.
  """
  return {"peak": stats.peak_memory_in_bytes, "arguments": stats.argument_size_in_bytes,
          "temporaries": stats.temp_size_in_bytes,
          "outputs": stats.output_size_in_bytes - stats.alias_size_in_bytes,
          "code": stats.generated_code_size_in_bytes}


def _memory_asked(message: str) -> dict[str, float]:
  """Parses what a program that does not fit would need from either form of XLA's error.

  "HLO temporaries" in the second form includes arguments and outputs, like the peak of `_memory`.
  """
  size = r"([0-9.]+)([KMGT])"
  found = (re.search(rf"Used {size} of {size} hbm", message)
           or re.search(rf"HLO temporaries \({size}\) exceeds available HBM \({size}\)", message))
  if not found:  # not about HBM, so not a question of fitting
    return {}
  unit = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
  return {"hbm_needed": float(found[1]) * unit[found[2]],
          "hbm_there": float(found[3]) * unit[found[4]]}


def one_line(error: Exception) -> str:
  """Returns an error as one line, truncated if it is long."""
  if isinstance(error, MemoryError):  # its message is empty
    return OUT_OF_MEMORY
  text = " ".join(str(error).split())
  return (text if len(text) <= 300 else text[:300] + " ...") or type(error).__name__


def compiler_flags() -> list[str]:
  """Environment variables that affect the compiler or the program that JAX lowers."""
  return [f"{name}={os.environ[name]}" for name in sorted(os.environ)
          if os.environ[name] and (name in ("LIBTPU_INIT_ARGS", "XLA_FLAGS")
                                   or name.startswith("JAX_")
                                   and not re.search(_NOT_OF_THE_PROGRAM, name))]


def versions() -> dict[str, str | None]:
  """Installed versions of the packages that affect the result; None for a missing one."""
  found: dict[str, str | None] = {}
  for package in ("jax", "jaxlib", "libtpu", "flax", "optax"):
    try:
      found[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      found[package] = None
  return found


if __name__ == "__main__":
  os.environ.update(ENVIRONMENT)
  main(sys.argv[1], sys.argv[2])
