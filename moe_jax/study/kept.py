"""Archives compact records of runs, small enough to commit: everything but the large files.

An archive has the layout of an --out folder and is read the same way. A run's record has
config.json, status.json, the unmodified held-out evaluation and one file of subsampled metrics.
Folders from several sittings are merged run by run, keeping the record that progressed further.
"""

import itertools
import json
import os
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from typing import Any

from etils import epath

from moe_jax import run_dir as run_dir_lib
from moe_jax.branch import require_trunk
from moe_jax.config import RunConfig, identity_hash
from moe_jax.errors import FieldError, require
from moe_jax.evaluate.results import Row, facts, recipe_hash, rows_of
from moe_jax.evaluate.text import HELDOUT
from moe_jax.files import write_bytes, write_json, write_text
from moe_jax.grid import Grid
from moe_jax.run_dir import RunDir

POINTS, DIGITS = 200, 5
TRAINING_DROP_RATE = "training_drop_rate"
NOT_RUN, NOT_OF_THE_GRID = "not run", "not of the grid"

# Progress of a run. A record is only replaced by one with more progress.
EVALUATED, FINISHED, ENDED, BEGUN, NOTHING = 4, 3, 2, 1, 0


def progress(run: RunDir) -> int:
  """Returns the progress of a run. Raises FieldError if its files are damaged."""
  config, state = run.read_config(), run.read_status().get("state")
  if config is None:
    return NOTHING
  if state == run_dir_lib.FINISHED:
    found = run.read_eval(HELDOUT) or {}
    return EVALUATED if found.get("identity") == identity_hash(config) else FINISHED
  return ENDED if state in (run_dir_lib.DIVERGED, run_dir_lib.FAILED) else BEGUN


def keep_run(source: RunDir, target: RunDir) -> bool:
  """Writes a run's record, unless `target` already has one of the same run with as much progress.

  Returns:
    Whether it was written.

  Raises:
    FieldError: the existing record is of another identity or another text, or a file is damaged.
  """
  ours, theirs = source.read_config(), target.read_config()
  if ours is None:
    return False
  if theirs is not None:
    require(identity_hash(ours) == identity_hash(theirs), "out", str(source.path),
            f"is not the run archived as {target.path}: identities {identity_hash(ours)} and "
            f"{identity_hash(theirs)}")
    text, kept_text = fingerprint(source), fingerprint(target)
    require(None in (text, kept_text) or text == kept_text, "out", str(source.path),
            f"was evaluated on a different text than the same run archived as {target.path}: "
            f"data_fingerprint {text} and {kept_text}")
    if progress(source) <= progress(target):
      return False
  if (file := source.path / "eval" / f"{HELDOUT}.json").exists():
    write_bytes(target.path / "eval" / file.name, file.read_bytes())
  lines = [json.dumps({key: _rounded(value) for key, value in record.items()})
           for record in thinned(source.read_metrics())]
  if lines:
    write_text(target.metrics_file(1, 1), "\n".join(lines) + "\n")
  # Drop the host and process: they are irrelevant to the result.
  status = source.read_status()
  if status:
    write_json(target.path / "status.json", status | {"host": "", "pid": 1})
  write_bytes(target.path / "config.json", (source.path / "config.json").read_bytes())
  return True


def fingerprint(run: RunDir) -> str | None:
  """Returns the data fingerprint of a run's held-out evaluation, or None if it has none.

  It tells texts apart that an identity cannot, since that contains only the corpus's name.
  """
  config, found = run.read_config(), run.read_eval(HELDOUT) or {}
  if config is None or found.get("identity") != identity_hash(config):
    return None
  return found.get("data_fingerprint")


def thinned(records: Sequence[dict[str, Any]], points: int = POINTS) -> list[dict[str, Any]]:
  """Returns at most `points` records, evenly spaced and including the first and the last."""
  if len(records) <= points:
    return list(records)
  last = len(records) - 1
  return [records[round(i * last / (points - 1))] for i in range(points)]


def _rounded(value: Any) -> Any:
  return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def keep(out: str | os.PathLike, to: str | os.PathLike,
         experiments: Iterable[str]) -> tuple[int, int, list[str]]:
  """Archives all runs of some experiments from a folder of runs or from a .zip made by `pack`.

  Returns:
    (records written, runs that needed no new record, a line for each run that was refused).

  Raises:
    FieldError: `out` does not exist or is neither a folder nor a readable .zip.
  """
  root = epath.Path(out)
  require(root.exists(), "out", os.fspath(out), "does not exist")
  require(root.is_dir() or root.suffix == ".zip", "out", os.fspath(out),
          "must be a folder of runs or a .zip")
  if root.suffix == ".zip":
    with tempfile.TemporaryDirectory() as folder:
      try:
        with zipfile.ZipFile(os.fspath(out)) as file:
          file.extractall(folder)
      except (zipfile.BadZipFile, EOFError) as error:
        raise FieldError("out", os.fspath(out), f"is not a valid .zip: {error}") from None
      return keep(folder, to, experiments)
  written, same, problems = 0, 0, []
  for experiment in experiments:
    for file in sorted((root / experiment).glob("*/config.json")):
      source = RunDir(file.parent)
      try:
        done = keep_run(source, RunDir(epath.Path(to) / experiment / source.path.name))
      except FieldError as error:
        problems.append(f"{experiment}/{source.path.name}: not archived: {error}")
        continue
      written, same = written + done, same + (not done)
  return written, same, problems


def table(kept: str | os.PathLike, grid: Grid) -> list[tuple[RunConfig, Row]]:
  """Returns a row for each cell of a grid, then rows for archived runs that are not in the grid.

  A row has the cell's result or the reason it has none. A trunk is not a result, so it only gets a
  row if it started but did not finish.

  Raises:
    FieldError: a record is damaged, a run has another identity than the grid's cell, or two runs
      have the same corpus name but different texts.
  """
  folder = epath.Path(kept) / grid.name
  trunks = {config.train.branch_run for config in grid.cells}
  found = []
  for name, config in zip(grid.names, grid.cells, strict=True):
    run = RunDir(folder / name)
    stored = run.read_config()
    require(stored is None or identity_hash(stored) == identity_hash(config), "out",
            str(run.path), "does not have the identity of the grid's cell")
    if name not in trunks or progress(run) in (BEGUN, ENDED):
      found += [(config, row) for row in _rows(grid.name, name, config, run)]
  for file in sorted(folder.glob("*/config.json")):
    run = RunDir(file.parent)
    if run.path.name not in grid.names:
      config = run.read_config()
      found += [(config, row | {"state": NOT_OF_THE_GRID})
                for row in _rows(grid.name, run.path.name, config, run)]
  _require_one_text(folder, [row for _, row in found])
  return found


def _require_one_text(folder: epath.Path, rows: Iterable[Row]) -> None:
  """Requires a single fingerprint per corpus and tokenizer among the rows that have one."""
  first: dict[tuple[str, str], Row] = {}
  for row in rows:
    text = row.get("data_fingerprint")
    if text is None:
      continue
    other = first.setdefault((row["corpus"], row["tokenizer"]), row)
    require(text == other["data_fingerprint"], "out", str(folder),
            f"{other['cell']} and {row['cell']} were evaluated on two texts named "
            f"{row['corpus']!r}: data_fingerprint {other['data_fingerprint']} and {text}; remove "
            "the runs of one of them")


def _rows(experiment: str, name: str, config: RunConfig, run: RunDir) -> list[Row]:
  rows = [] if progress(run) < EVALUATED else [
      row | {TRAINING_DROP_RATE: training_drop_rate(run, config)}
      for row in rows_of(run) if row["evaluation"] == HELDOUT]
  if rows:
    return rows
  status = run.read_status()
  error = " ".join((status.get("error") or "").split()) or None
  if not status and (trunk := lost_trunk(run, config)) is not None:
    error = f"its trunk {trunk.path.name} diverged"
  return [{"experiment": experiment, "cell": name, "identity": identity_hash(config),
           "recipe_hash": recipe_hash(config), "evaluation": HELDOUT, **facts(config),
           "tokens": config.train.steps * config.batch_tokens,
           "state": status.get("state", NOT_RUN), "step": status.get("step"),
           "steps": config.train.steps, "loss": None, "commit": status.get("commit"),
           "device_kind": status.get("device_kind"),
           "error": error}]


def lost_trunk(run: RunDir, config: RunConfig) -> RunDir | None:
  """Returns the trunk of a branch if it diverged before the branch point, else None.

  Such a branch can never start.

  Raises:
    FieldError: the trunk's files are damaged, or it is not the trunk the branch was meant for.
  """
  trunk = run.trunk(config)
  if trunk is None:
    return None
  status, theirs = trunk.read_status(), trunk.read_config()
  if (status.get("state") != run_dir_lib.DIVERGED or theirs is None
      or status.get("step", 0) >= config.train.branch_step):
    return None
  require_trunk(config, theirs)
  return trunk


def training_drop_rate(run: RunDir, config: RunConfig) -> float | None:
  """Mean fraction of assignments dropped after warm-up, including a branch's trunk.

  Each logged step (a record has at most POINTS) is weighted by the number of steps since the
  previous one, so the logging interval does not matter. None if any part of the training lacks it.
  """
  branch = config.train.branch_step or 0
  parts = [[record for record in run.read_metrics() if record["step"] > branch]]
  if branch:
    trunk = run.trunk(config)
    parts.insert(0, [record for record in trunk.read_metrics() if record["step"] <= branch])
  if not all(parts):
    return None
  last, dropped, steps = config.train.warmup_steps, 0.0, 0
  for record in itertools.chain(*parts):
    since, rate = record["step"] - last, record.get("drop_rate")
    if since <= 0:
      continue
    if rate is None:
      return None
    last, dropped, steps = record["step"], dropped + rate * since, steps + since
  return dropped / steps if steps else None


def pack(kept: str | os.PathLike, to: str | os.PathLike,
         part_bytes: int | None = None) -> list[epath.Path]:
  """Packs a folder of records into one .zip, or into several of at most `part_bytes` each.

  A run is never split over several files.

  Raises:
    FieldError: a single run takes more than `part_bytes`; nothing is written then.
  """
  root, files = epath.Path(kept), [[]]
  size = 0
  with tempfile.TemporaryDirectory() as scratch:
    for number, config in enumerate(sorted(root.glob("*/*/config.json"))):
      run = config.parent
      content = [(f"{run.parent.name}/{run.name}/{file.relative_to(run)}", file.read_bytes())
                 for pattern in ("*.json", "*/*.json", "metrics/*.jsonl")
                 for file in sorted(run.glob(pattern))]
      if part_bytes is not None:
        probe = f"{scratch}/{number}.zip"
        _zip(probe, content)
        needed = os.path.getsize(probe)
        os.unlink(probe)
        require(needed <= part_bytes, "part_mb", part_bytes / 1e6,
                f"{run.parent.name}/{run.name} alone takes {needed / 1e6:.2g} MB")
        if files[-1] and size + needed > part_bytes:
          files.append([])
          size = 0
        size += needed
      files[-1] += content
  made = []
  for number, content in enumerate(files if files[0] else [], start=1):
    made.append(epath.Path(to) / f"results-{number}.zip")
    made[-1].parent.mkdir(parents=True, exist_ok=True)
    _zip(os.fspath(made[-1]), content)
  return made


def _zip(path: str, content: Sequence[tuple[str, bytes]]) -> None:
  with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as file:
    for name, data in content:
      file.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_LZMA)
