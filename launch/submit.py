"""Trains every cell of a grid.

    python -m launch.submit --config=experiments/quickstart.py --backend=local
    python -m launch.submit --config=experiments/quickstart.py --backend=gcloud \\
      --project=P --zones=us-east5-b,europe-west4-a --topology=v6e-16 --out=gs://BUCKET/runs

Finished cells are skipped; all others start, or resume where they stopped. The same command
starts, resumes and retries. `--dry_run` prints what would be run and writes nothing;
`--dry_run=json` prints it as JSON for programs, files included.
"""

import dataclasses
import json
import types

from absl import flags

from launch import backends, gate, options, plans, remote, together
from launch.code import Code, pack
from launch.jobs import (
    Job,
    jobs_of,
    joint_command,
    lost_ends,
    plan,
    require_sources,
    require_texts,
    trained_together,
)
from launch.table import shapes
from moe_jax import cli
from moe_jax.errors import require
from moe_jax.files import absolute, is_local, reaching

_CONFIG = cli.define_config_flag()
_OUT = flags.DEFINE_string("out", "runs", "Root of the run directories.")
_BACKEND = flags.DEFINE_enum("backend", backends.LOCAL, backends.names(), "Where the cells run.")
_PARALLEL = flags.DEFINE_integer("parallel", 1, "[local] How many cells run at a time.",
                                 lower_bound=1)
_PROCESSES = flags.DEFINE_integer("processes", 1, "[local] Processes per run, all on this "
                                  "machine; to try out multi-process runs.", lower_bound=1)
_PLAN = flags.DEFINE_enum(
    "plan", gate.KNOWN, [gate.KNOWN, gate.MAKE, gate.IGNORE], "[TPU slices] How earlier "
    "moe_jax.plan results gate the submission. known: use existing plans; make: compile missing "
    "plans first; ignore: skip the check.")
_DRY_RUN = options.define_dry_run_flag()
_OPTIONS = options.define_flags(backends.remote())


def main(overrides: list[str]) -> int:
  given = {name: holder.value for name, holder in _OPTIONS.items()}
  backend = backends.load(_BACKEND.value)
  if _BACKEND.value == backends.LOCAL:
    for name, text in given.items():
      require(text is None, name, text, "is not an option of --backend=local")
    require(not flags.FLAGS["plan"].present, "plan", _PLAN.value, "is only for TPU slices")
    return _submit_local(cli.selected_cells(_CONFIG.value, overrides), overrides, backend)
  for name in ("parallel", "processes"):
    require(not flags.FLAGS[name].present, name, flags.FLAGS[name].value,
            "is an option of --backend=local only")
  chosen = options.from_flags(backend.Options, _BACKEND.value, given)
  cells = cli.selected_cells(_CONFIG.value, overrides)
  out = absolute(_OUT.value)  # other machines have another working directory
  jobs = (jobs_of if _DRY_RUN.value else plan)(cells, out, overrides)
  return _submit_remote(jobs, out, backend, chosen, overrides)


def _submit_local(cells, overrides: list[str], backend: types.ModuleType) -> int:
  jobs = [dataclasses.replace(job, command=together.command(_PROCESSES.value, job.command))
          for job in plan(cells, _OUT.value, overrides)]
  for job in jobs:
    require(_PROCESSES.value == 1 or job.cell.config.execution.population == 1, "processes",
            _PROCESSES.value, "must be 1 when cells train together (execution.population)")
  with reaching(_OUT.value):  # in a dry run too, since nothing could be run
    require_sources(jobs)
  if _DRY_RUN.value == "json":
    print(json.dumps({"backend": backends.LOCAL, "commands": [
        joint_command([job.command for job in group]) for group in trained_together(jobs)]},
        indent=1))
    return 0
  notes = [*shapes(cells), *lost_ends(jobs)]
  if _DRY_RUN.value:  # a script that a shell can run
    print("\n".join([*("# " + line for line in notes), *backend.dry_run(jobs)]))
    return 0
  print("\n".join(notes), flush=True)
  return backend.submit(jobs, _PARALLEL.value)


def _submit_remote(jobs: tuple[Job, ...], out: str, backend: types.ModuleType, chosen,
                   overrides: list[str]) -> int:
  for name, path in (("out", out), ("config", _CONFIG.value)):
    options.require_path(name, path)
  for job in jobs:
    number = job.cell.config.execution.population
    require(number == 1 or chosen.run_devices == 1, "config.execution.population", number,
            "must be 1: cells train together on a single device, and each run has "
            f"{chosen.run_devices}; use v6e-1, v5litepod-1, or one GPU on one node")
  if is_local(out) or not _DRY_RUN.value:  # a dry run makes no requests to an object store
    with reaching(out):
      require_sources(jobs)
      require_texts(jobs, out)
  code = pack(_CONFIG.value.partition(":")[0])
  planned = backend.plan(jobs, chosen, code, out)
  planned = dataclasses.replace(planned, notes=(
      *_notes(out, code), *_gate(jobs, chosen, out, overrides)))
  if _DRY_RUN.value == "json":
    print(plans.to_json(planned))
    return 0
  cells = shapes([job.cell for job in jobs])
  if _DRY_RUN.value:
    print("\n".join([*("# " + line for line in cells), *plans.to_text(planned)]))
    return 0
  print("\n".join([*cells, *lost_ends(jobs), *planned.notes]), flush=True)
  with reaching(out):
    return backend.submit(planned, jobs, chosen, code, out)


def _gate(jobs: tuple[Job, ...], chosen, out: str, overrides: list[str]) -> tuple[str, ...]:
  """Returns notes from plans, if on TPU slices. Raises FieldError if cells do not fit."""
  if not hasattr(chosen, "slice"):
    require(not flags.FLAGS["plan"].present, "plan", _PLAN.value, "is only for TPU slices")
    gate.require_mesh(jobs, chosen.devices)
    return ()
  if _PLAN.value == gate.IGNORE:
    return ()
  topology, plans_in = chosen.slice.topology, gate.folder(out)
  planning = gate.command(_CONFIG.value, topology, plans_in, overrides)
  if _PLAN.value == gate.MAKE and not _DRY_RUN.value:
    gate.make(planning)
  limit = getattr(chosen, "max_cost_usd", None)
  number = max(job.cell.config.execution.population for job in jobs)
  return (
      *gate.notes(jobs, topology, plans_in, chosen.usd_per_chip_hour, planning),
      *([] if number == 1 else [f"plans are for a single cell; up to {number} cells train "
                                f"together here and need up to {number} times its memory"]),
      *([] if limit is None else [f"all slices end before spending exceeds ${limit:g}"]))


def _notes(out: str, code: Code) -> tuple[str, ...]:
  left_out = () if not code.left_out else (
      f"untracked, so left out of the code: {', '.join(code.left_out[:5])}"
      + (f" and {len(code.left_out) - 5} more" if len(code.left_out) > 5 else ""),)
  return (f"code {code.commit}, {len(code.archive):,} bytes, sha256 {code.sha256}",
          *left_out, *remote.note_on(out))


if __name__ == "__main__":
  cli.run(main)
