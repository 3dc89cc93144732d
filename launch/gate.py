"""Checks a TPU submission against earlier plans: refuses what does not fit, prices the rest.

Imports no JAX: plans are files that `python -m moe_jax.plan` wrote on this machine.
"""

import subprocess
import sys
from collections.abc import Sequence

from launch.jobs import Job
from moe_jax.arch.hardware import PRICES_AS_OF
from moe_jax.config import resolve_mesh
from moe_jax.errors import FieldError
from moe_jax.files import is_local
from moe_jax.plan import cells as cells_lib
from moe_jax.plan.cells import Plan
from moe_jax.plan.topology import Topology

KNOWN, MAKE, IGNORE = "known", "make", "ignore"  # the values of --plan


def folder(out: str) -> str:
  """Returns the folder of plans: --out or, where that is a bucket, this machine's default."""
  return out if is_local(out) else "runs"


def command(spec: str, topology: Topology, out: str,
            overrides: Sequence[str]) -> tuple[str, ...]:
  """Returns the command that plans these cells, in which `python` stands for the interpreter."""
  slices = (f"--slices={topology.n_slices}",) if topology.n_slices > 1 else ()
  return ("python", "-m", "moe_jax.plan", f"--config={spec}", f"--topology={topology.name}",
          *slices, f"--out={out}", *overrides)


def make(planning: Sequence[str]) -> None:
  """Runs the planning command and shows its output. Raises FieldError if it cannot plan."""
  done = subprocess.run((sys.executable, *planning[1:]), check=False)
  if done.returncode not in (0, 1):  # 1: a cell does not fit, which notes() reports
    raise FieldError("plan", MAKE, f"moe_jax.plan ended with exit code {done.returncode}")


def notes(jobs: Sequence[Job], topology: Topology, out: str, price: float | None,
          planning: Sequence[str]) -> tuple[str, ...]:
  """Returns lines that give the estimated bill and how many cells have no plan.

  Args:
    jobs: all cells of the submission.
    topology: the topology of each run.
    out: directory of the plans, see `folder`.
    price: US dollars per chip-hour; None means the catalog's.
    planning: the command that makes the plans.

  Raises:
    FieldError: cells do not fit, in memory or because of their mesh.
  """
  found = [cells_lib.known_plan(job.name, job.cell.config, topology, out) for job in jobs]
  _refuse([plan for plan in found if plan is not None and not plan.fits], out)
  known = [plan for plan in found if plan is not None]
  lines = (_bill(known, topology, price),) if known else ()
  if missing := len(found) - len(known):
    lines += (f"{missing} of {len(jobs)} cells have no plan for {topology.label}, so whether they "
              "fit and what they cost is unknown; to find out, add --plan=make or run",
              f"  {' '.join(planning)}")
  return lines


def require_mesh(jobs: Sequence[Job], devices: int | None) -> None:
  """Raises FieldError if a cell cannot be split over `devices`; None (unknown) skips the check."""
  for job in jobs if devices else ():
    try:
      resolve_mesh(job.cell.config, devices)
    except FieldError as error:
      raise error.under("config") from None


def _refuse(plans: Sequence[Plan], out: str) -> None:
  if not plans:
    return
  first = plans[0]
  if first.fits is False:
    first = cells_lib.with_known_remedy(first, out)
  others = f" (and {len(plans) - 1} more)" if len(plans) > 1 else ""
  raise FieldError("topology", first.topology.label, f"{first.cell} {cells_lib.verdict(first)}"
                   f"{others}; --plan=ignore submits it anyway")


def _bill(plans: Sequence[Plan], topology: Topology, price: float | None) -> str:
  hours = sum(plan.chip_hours for plan in plans)
  line = f"{len(plans)} planned cells take an estimated {hours:,.4g} chip-hours of {topology.label}"
  usd = topology.hardware.usd_per_chip_hour if price is None else price
  if usd is None:
    return f"{line}; it has no public price; set --usd_per_chip_hour=N for the cost"
  whose = f"on demand, by {PRICES_AS_OF}" if price is None else "as given"
  return f"{line}: ${hours * usd:,.2f} at ${usd:g} a chip-hour, {whose}"
