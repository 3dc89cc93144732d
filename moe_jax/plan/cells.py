"""Plans the cells of a grid in parallel, each in its own process. No JAX here."""

import concurrent.futures
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import pathlib
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from etils import epath

import moe_jax
from moe_jax import config as config_lib
from moe_jax.arch import count
from moe_jax.config import RunConfig, resolve_mesh
from moe_jax.errors import DamagedFile, FieldError
from moe_jax.files import reaching, read_json, write_json
from moe_jax.grid import Cell
from moe_jax.plan import coarse, compilers, worker
from moe_jax.plan.topology import Topology

_GIB = 2**30
_LEAST_SAVED = 0.5  # fraction of the missing bytes that a change must be estimated to save


@dataclasses.dataclass(frozen=True)
class Plan:
  """The plan of one cell on one topology.

  Attributes:
    cell: name of the cell.
    config: the configuration that was compiled.
    topology: the slices that it was compiled for.
    result: what worker.compile_cell returned; empty if it failed.
    error: why there is no result, in one line; empty if there is one.
    needs: bytes per device that a program too large to fit asked for; None otherwise.
    there: bytes per device available to it, from the compiler's error; None if not reported.
    remedy: overrides under which a cell that does not fit would fit, if any were found.
    remedy_seconds: estimated step time with these overrides.
  """

  cell: str
  config: RunConfig
  topology: Topology
  result: dict[str, Any]
  error: str = ""
  needs: float | None = None
  there: float | None = None
  remedy: str = ""
  remedy_seconds: float | None = None

  @property
  def hbm_there(self) -> float:
    """Bytes per device that a program can use, which is less than the chip has."""
    return self.there or self.topology.hardware.program_hbm_bytes

  @property
  def hbm_needed(self) -> float | None:
    """Peak bytes per device of arguments, temporaries and outputs.

    XLA checks this figure against the available memory, whether it then compiles or refuses.
    """
    return self.result["memory"]["peak"] if self.result else self.needs

  @property
  def hbm_left(self) -> float | None:
    """Bytes per device that remain free; negative if the program does not fit."""
    return None if self.hbm_needed is None else self.hbm_there - self.hbm_needed

  @property
  def fits(self) -> bool | None:
    """Whether the program fits; None if unknown."""
    return None if self.hbm_needed is None else bool(
        self.result and self.hbm_needed <= self.hbm_there)

  @property
  def seconds(self) -> float | None:
    """Estimated step time: XLA's estimates plus those of cost.py for the rest, uncalibrated."""
    return self.result.get("seconds")

  @property
  def tokens_per_second(self) -> float | None:
    return self.seconds and self.config.batch_tokens / self.seconds

  @property
  def mfu(self) -> float | None:
    """MFU from active parameters and causal attention, without recomputation or empty slots."""
    if not self.seconds:
      return None
    useful = count.training_flops_per_token(self.config.arch, self.config.data.seq_len)
    peak = self.topology.hardware.device_bf16_flops * self.topology.devices
    return useful * self.tokens_per_second / peak

  @property
  def chip_hours(self) -> float | None:
    """Chip-hours of all steps, with the remedy if the cell needs one.

    A branch counts from the step at which it leaves its trunk. None if the cell does not fit and no
    remedy is known.
    """
    steps = self.config.train.steps - (self.config.train.branch_step or 0)
    seconds = self.seconds if self.fits else self.remedy_seconds
    return seconds and seconds * steps * self.topology.chips / 3600

  def usd(self, usd_per_chip_hour: float | None) -> float | None:
    """Cost of all steps; None without a price."""
    if self.chip_hours is None or usd_per_chip_hour is None:
      return None
    return self.chip_hours * usd_per_chip_hour


def plan_cells(cells: Sequence[Cell], topology: Topology, out: str | os.PathLike, *,
               parallel: int = 1, remedies: bool = True, hlo_out: str | None = None,
               say: Callable[[str], None] = print) -> list[Plan]:
  """Plans each cell, by compiling it or from the cached result of an earlier plan.

  Args:
    cells: the cells to plan.
    topology: the slices to plan them for.
    out: directory of all experiments; results are cached in `<out>/_plans`.
    parallel: number of concurrent compilations.
    remedies: whether a cell that does not fit is recompiled with changes that may make it fit.
    hlo_out: folder for the HLO text of each cell; None writes none.
    say: called with a line of progress for each cell as it finishes.

  Raises:
    FieldError: libtpu is missing or is not the version that this JAX requires, or a folder cannot
      be written.
  """
  check_libtpu(topology)
  with reaching(out):
    (epath.Path(out) / "_plans").mkdir(parents=True, exist_ok=True)
  if hlo_out:
    try:
      pathlib.Path(hlo_out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
      raise FieldError("hlo_out", hlo_out, f"cannot be created: {error.strerror}") from None
  lock, done = threading.Lock(), 0

  def one(cell: Cell) -> Plan:
    nonlocal done
    plan = plan_config(cell.name, cell.config, topology, out, hlo_out)
    if plan.fits is False and remedies:
      plan = _with_remedy(plan, out)
    with lock:
      done += 1
      say(f"[{done}/{len(cells)}] {cell.name}: {verdict(plan)}")
    return plan

  with concurrent.futures.ThreadPoolExecutor(parallel) as pool:
    try:
      return list(pool.map(one, cells))
    except BaseException:  # a compiler ignores signals until it is done, which takes minutes
      pool.shutdown(wait=False, cancel_futures=True)
      compilers.kill()
      raise


def plan_config(name: str, config: RunConfig, topology: Topology, out: str | os.PathLike,
                hlo_out: str | None = None) -> Plan:
  """Plans one configuration; errors are returned in the plan."""
  plan = known_plan(name, config, topology, out)
  if plan is not None and (plan.error or not hlo_out):
    return plan
  hlo = None
  if hlo_out:
    hlo = os.fspath(pathlib.Path(hlo_out, f"{name}.{topology.label}.hlo.txt").absolute())
  result = compilers.compile_apart(config, topology, hlo,
                                   os.fspath(epath.Path(out) / "_plans" / "programs"))
  if "error" not in result or "hbm_needed" in result:
    try:
      write_json(_cached(config, topology, out), result)
    except OSError as error:  # e.g. a full disk: the result is still good
      print(f"warning: the plan of {name} cannot be saved: {error}", file=sys.stderr)
  return _plan_of(name, config, topology, result)


def known_plan(name: str, config: RunConfig, topology: Topology,
               out: str | os.PathLike) -> Plan | None:
  """Returns the plan if it is known without compiling, else None.

  It is known if it is cached under `out`, or if the mesh does not fit the slice.
  """
  try:
    resolve_mesh(config, topology.devices, topology.n_slices)
  except FieldError as error:
    return Plan(name, config, topology, {}, str(error.under("config")))
  result = _read_result(_cached(config, topology, out))
  return None if result is None else _plan_of(name, config, topology, result)


def _read_result(path: epath.Path) -> dict[str, Any] | None:
  """Reads a cached result; None if it is missing, damaged or incomplete and must be rebuilt."""
  try:
    result = read_json(path)
  except DamagedFile:
    return None
  whole = isinstance(result, dict) and (
      {"error", "hbm_needed"} <= result.keys() or {"memory", "seconds"} <= result.keys())
  return result if whole else None


def with_known_remedy(plan: Plan, out: str | os.PathLike) -> Plan:
  """Adds to a plan the fastest remedy that fits among those that are already cached."""
  known = [(overrides, known_plan(plan.cell, config, plan.topology, out))
           for overrides, config in changes_that_save(plan.config, plan.topology)]
  fitting = [(overrides, other) for overrides, other in known if other is not None and other.fits]
  if not fitting:
    return plan
  overrides, other = min(fitting, key=lambda pair: pair[1].seconds)
  return dataclasses.replace(plan, remedy=overrides, remedy_seconds=other.seconds)


def _plan_of(name: str, config: RunConfig, topology: Topology, result: dict[str, Any]) -> Plan:
  if "error" in result:
    return Plan(name, config, topology, {}, result["error"], result.get("hbm_needed"),
                result.get("hbm_there"))
  return Plan(name, config, topology, result)


def _cached(config: RunConfig, topology: Topology, out: str | os.PathLike) -> epath.Path:
  return epath.Path(out) / "_plans" / f"{_key(config, topology)}.json"


def verdict(plan: Plan) -> str:
  """Returns one phrase about a plan, for a line of progress."""
  if plan.fits is None:
    return f"failed: {plan.error}"
  if not plan.fits:
    line = (f"does not fit: needs {plan.hbm_needed / _GIB:.2f} GiB of {plan.hbm_there / _GIB:.4g}"
            f", {-plan.hbm_left / _GIB:.2f} GiB over")
    line += f"; fits with {plan.remedy}" if plan.remedy else ""
    return line + (f", {plan.remedy_seconds * 1e3:.1f} ms a step" if plan.remedy_seconds else "")
  return (f"fits in {plan.hbm_needed / _GIB:.1f} of {plan.hbm_there / _GIB:.4g} GiB, estimated "
          f"{plan.seconds * 1e3:.1f} ms a step, compiled in {plan.result['compile_seconds']:.0f} s")


def check_libtpu(topology: Topology) -> None:
  """Raises FieldError if libtpu is missing or is not the version that this JAX requires."""
  import importlib.metadata
  import importlib.util

  from packaging.requirements import Requirement
  found = worker.versions()
  command = f"pip install 'jax[tpu]=={found['jax']}'"
  if found["libtpu"] is None:
    raise FieldError("topology", topology.name, "libtpu, which holds the TPU compiler, is not "
                     f"installed: {command}")
  for text in importlib.metadata.requires("jax") or ():
    wanted = Requirement(text)
    if wanted.name == "libtpu" and not wanted.specifier.contains(found["libtpu"]):
      raise FieldError("topology", topology.name, f"libtpu {found['libtpu']} is installed, jax "
                       f"{found['jax']} requires libtpu{wanted.specifier}: {command}")
  package = importlib.util.find_spec("libtpu")
  if package is None or package.origin is None:  # an empty folder, or only the metadata
    raise FieldError("topology", topology.name, f"libtpu {found['libtpu']} is recorded as "
                     f"installed, without its files: {command} --force-reinstall")


def _with_remedy(plan: Plan, out: str | os.PathLike) -> Plan:
  """Adds to a plan overrides under which the cell fits, if any of a few candidates does.

  Candidates are compiled in order of estimated step time, until one fits.
  """
  for overrides, config in sorted(_promising(plan), key=lambda change: coarse.step_seconds(
      change[1], plan.topology)):
    other = plan_config(plan.cell, config, plan.topology, out)
    if other.fits:
      return dataclasses.replace(plan, remedy=overrides, remedy_seconds=other.seconds)
  return plan


def _promising(plan: Plan) -> Iterator[tuple[str, RunConfig]]:
  """Yields one candidate for each kind of change that saves memory.

  It is the mildest change estimated to save what is missing; if there is none, the strongest,
  provided that it is estimated to save _LEAST_SAVED of it.
  """
  missing = -plan.hbm_left
  now = coarse.device_bytes(plan.config, plan.topology)
  kinds = itertools.groupby(changes_that_save(plan.config, plan.topology),
                            key=lambda change: _kind(plan.config, change[1]))
  for _, changes in kinds:
    saved = [(now - coarse.device_bytes(config, plan.topology), overrides, config)
             for overrides, config in changes]
    enough = [change for change in saved if change[0] >= missing]
    best, overrides, config = enough[0] if enough else saved[-1]
    if best >= _LEAST_SAVED * missing:
      yield overrides, config


def _kind(before: RunConfig, after: RunConfig) -> str:
  """Classifies a change of changes_that_save by what it changes besides remat."""
  if after.execution.mesh != before.execution.mesh:
    return "mesh"
  return "remat" if after.execution.microbatches == before.execution.microbatches else "batch"


def changes_that_save(config: RunConfig, topology: Topology) -> Iterator[tuple[str, RunConfig]]:
  """Yields valid changes of execution that save memory, cheapest first: (flags, config)."""
  tried = []
  whole = {"remat": "full"} if config.execution.remat != "full" else {}
  if whole:
    tried.append(whole)
  for times in (2, 4, 8, 16, 32):
    tried.append(whole | {"microbatches": config.execution.microbatches * times})
  fsdp = config.execution.mesh.fsdp * 2
  while fsdp <= topology.devices:
    tried.append(whole | {"mesh": dataclasses.replace(config.execution.mesh, fsdp=fsdp, data=-1)})
    fsdp *= 2
  yield from _valid(config, topology, tried)


def _valid(config: RunConfig, topology: Topology, tried) -> Iterator[tuple[str, RunConfig]]:
  for changes in tried:
    try:
      changed = dataclasses.replace(
          config, execution=dataclasses.replace(config.execution, **changes))
      resolve_mesh(changed, topology.devices, topology.n_slices)
    except FieldError:
      continue
    flags = {name: value for name, value in changes.items() if name != "mesh"}
    if "mesh" in changes:
      flags |= {f"mesh.{axis}": size
                for axis, size in dataclasses.asdict(changes["mesh"]).items()
                if size != getattr(config.execution.mesh, axis)}
    yield " ".join(f"--config.execution.{name}={value}" for name, value in flags.items()), changed


@functools.cache
def _source_hash() -> str:
  """Hash of this package's source: changed code may compile to a different program."""
  digest = hashlib.sha256()
  for file in sorted(pathlib.Path(moe_jax.__file__).parent.rglob("*.py")):
    digest.update(file.read_bytes())
  return digest.hexdigest()


@functools.cache
def _versions() -> dict[str, str | None]:
  return worker.versions()


def _key(config: RunConfig, topology: Topology) -> str:
  """Cache key of a plan: hash of configuration, topology, versions, source and compiler flags."""
  told = [config_lib.to_dict(config), topology.name, topology.n_slices, _versions(),
          _source_hash(), *worker.compiler_flags()]
  return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:20]
