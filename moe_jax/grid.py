"""Grids of cells: what an experiment file returns, and how cells are named and selected."""

import collections
import dataclasses
import functools
import importlib.util
import os
import pathlib
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from moe_jax.arch import count
from moe_jax.branch import require_trunk
from moe_jax.config import RunConfig, TrainConfig, identity, identity_difference
from moe_jax.errors import FieldError, did_you_mean, require
from moe_jax.fields import override

# Every name begins with these five fields; all others appear only where they differ.
_SHAPE_TAGS = {"arch.n_layers": "l", "arch.d_model": "d", "arch.d_expert": "f",
               "arch.n_exp": "e", "arch.n_topk": "k"}
_SUFFIX_TAGS = {
    "arch.n_heads": "h", "arch.n_kv_heads": "kv", "arch.vocab_size": "v",
    "arch.n_shared_experts": "shared", "arch.n_dense_layers": "dense",
    "moe.capacity_factor": "cf", "moe.routing_group_tokens": "group",
    "moe.norm_topk_prob": "norm", "moe.balance_coef": "bal", "moe.z_coef": "z",
    "moe.router": "", "moe.bias_update_rate": "rate", "moe.drop_order": "drop",
    "data.seq_len": "seq", "train.batch_size": "b", "train.learning_rate": "lr",
    "train.warmup_steps": "warmup", "train.weight_decay": "wd",
    "train.decay_fraction": "decay", "train.branch_from": "branch",
    "train.init_from": "init-",
    "seed_init": "s", "seed_data": "sd",
}


def _format(value: Any) -> str:
  """Formats a value for a name: 3e-3 for 0.003, 0 for False; safe in paths and job names."""
  if isinstance(value, bool):
    return str(int(value))
  if isinstance(value, float):
    mantissa, exponent = f"{value:.11e}".split("e")
    if -2 <= int(exponent) < 4:
      return f"{value:.12g}"
    return f"{float(mantissa):.12g}e{int(exponent)}"
  return re.sub(r"[^a-z0-9.]+", "-", str(value).lower()).strip("-")


def cell_name(config: RunConfig, recipe: RunConfig) -> str:
  """`l8-d512-f128-e64-k8`, with a suffix for each identity field that differs from the recipe.

  The name is used for the directory, the job, the metrics and the table row. Nothing ever
  parses it.
  """
  ours, default = identity(config), identity(recipe)
  parts = [tag + _format(ours[path]) for path, tag in _SHAPE_TAGS.items()]
  for path, value in ours.items():
    if path not in _SHAPE_TAGS and value != default[path]:
      tag = _SUFFIX_TAGS.get(path, path.rpartition(".")[2].replace("_", ""))
      parts.append(tag + _format(value))
  return "-".join(parts)


TOKENS = "train.tokens"  # not a field but an override, which sets train.steps


@dataclasses.dataclass(frozen=True)
class Grid:
  """A named, ordered set of cells that share a recipe.

  Attributes:
    name: the experiment's name, and its directory.
    recipe: the common configuration; a cell's name has only the fields that differ from it.
    cells: one configuration per cell. The steps from which other cells branch or are initialized
      are added to a cell's keep_steps.
    n_total: the intended size of all cells; None if sizes differ on purpose.
  """

  name: str
  recipe: RunConfig
  cells: tuple[RunConfig, ...]
  n_total: int | None = None

  def __post_init__(self):
    require(re.fullmatch(r"[a-z0-9][a-z0-9._-]*", self.name) is not None, "grid.name",
            self.name, "must be lower-case letters, digits, '.', '_' and '-'")
    require(self.n_total is None or (isinstance(self.n_total, int) and self.n_total > 0),
            "grid.n_total", self.n_total, "must be a whole number above 0, or None")
    require(isinstance(self.cells, tuple | list), "grid.cells", type(self.cells).__name__,
            "must be a tuple of configurations")
    require(len(self.cells) > 0, "grid.cells", self.cells, "must hold at least one cell")
    object.__setattr__(self, "cells", tuple(map(self._with_its_own_trunk, self.cells)))
    by_name = collections.defaultdict(list)
    for name, config in zip(self.names, self.cells, strict=True):
      by_name[name].append(config)
    for name, (first, *others) in by_name.items():
      if others:
        differing = identity_difference(first, others[0])
        raise FieldError("grid.cells", name, "two cells have this name: " + (
            "; ".join(differing) if differing else "they are the same run"))
    self._require_different_branches()
    object.__setattr__(self, "cells", self._keeping_what_others_need())

  def _require_different_branches(self) -> None:
    """Raises FieldError if two cells differ only in the step at which they branch."""
    seen: dict[tuple, str] = {}
    for name, config in zip(self.names, self.cells, strict=True):
      if config.train.branch_from is None:
        continue
      result = tuple((path, value) for path, value in identity(config).items()
                     if path != "train.branch_from")
      first = seen.setdefault(result, name)
      require(first == name, "grid.cells", name, f"is the same run as {first}: they differ only in "
              "the step at which they branch")

  def _with_its_own_trunk(self, config: RunConfig) -> RunConfig:
    """Shortens a trunk EXPERIMENT/CELL of this experiment to CELL.

    Trunks are looked up by cell name. The identity contains neither form.
    """
    experiment, slash, cell = (config.train.branch_run or "").partition("/")
    if not slash or experiment != self.name or "/" in cell:
      return config
    return override(config, {"train.branch_from": f"{cell}@{config.train.branch_step}"})

  def _keeping_what_others_need(self) -> tuple[RunConfig, ...]:
    """The cells, with the checkpoints that others start from in keep_steps. Raises FieldError."""
    cells = dict(zip(self.names, self.cells, strict=True))

    def keep(name: str, step: int) -> None:
      steps = {*cells[name].execution.keep_steps, step}
      cells[name] = override(cells[name], {"execution.keep_steps": tuple(sorted(steps))})

    for name, config in cells.items():
      source = _own_cell(config.train.init_run, self.name)
      if source in cells and config.train.init_step:
        keep(source, config.train.init_step)
      trunk = cells.get(config.train.branch_run)
      if trunk is None:  # not a branch, or its trunk is not in this grid
        continue
      try:
        require_trunk(config, trunk)
      except FieldError as error:
        raise FieldError("grid.cells", name, str(error)) from None
      keep(config.train.branch_run, config.train.branch_step)
    return tuple(cells.values())

  @functools.cached_property  # __post_init__ changes nothing in cells that affects their names
  def names(self) -> tuple[str, ...]:
    return tuple(cell_name(config, self.recipe) for config in self.cells)

  def get_config(self, cell: str) -> RunConfig:
    """The configuration of `cell`. Raises FieldError, which suggests the closest names."""
    names = self.names
    require(cell in names, "config", f"{self.name}:{cell}",
            "no such cell; " + did_you_mean(cell, list(names)))
    return self.cells[names.index(cell)]

  def override(self, changes: Mapping[str, Any]) -> "Grid":
    """Replaces the given fields in every cell.

    The recipe stays, so names show what was overridden. References between cells (branch_from,
    init_from) are updated to the new names. TOKENS sets train.steps to the nearest number of steps.
    """
    overridden = [override(config, _in_steps(changes, config)) for config in self.cells]
    cells, followed = overridden, None
    for _ in range(len(self.cells) + 2):  # renaming a cell may rename the cells that refer to it
      if cells == followed:
        return dataclasses.replace(self, cells=tuple(cells))
      new = {old: cell_name(config, self.recipe)
             for old, config in zip(self.names, cells, strict=True)}
      followed, cells = cells, [
          override(config, renamed) if (renamed := _to_new_names(
              config.train, self.name, new, changes)) else config for config in overridden]
    raise FieldError("grid.cells", self.name, "has a cell that begins, directly or through "
                     "other cells, from itself")

  def only(self, wanted: Sequence[str], changes: Mapping[str, Any]) -> "Grid":
    """The grid of the `wanted` cells, followed by those they refer to, directly or indirectly.

    A reference that `changes` overrides does not count.

    Raises:
      FieldError: there is no such cell.
    """
    kept = {cell: self.get_config(cell) for cell in wanted}
    ahead = list(kept.values())
    while ahead:
      train = ahead.pop().train
      followed = {"train.branch_from": train.branch_run,
                  "train.init_from": _own_cell(train.init_run, self.name)}
      for path, cell in followed.items():
        if path not in changes and cell in self.names and cell not in kept:
          ahead.append(kept.setdefault(cell, self.get_config(cell)))
    return dataclasses.replace(self, cells=tuple(kept.values()))


def _own_cell(run: str | None, experiment: str) -> str | None:
  """CELL if `run` is EXPERIMENT/CELL of that experiment, else None."""
  own, _, cell = (run or "").partition("/")
  return cell if own == experiment else None


def _to_new_names(train: TrainConfig, experiment: str, new: Mapping[str, str],
                  changes: Mapping[str, Any]) -> dict[str, Any]:
  """The overrides that update a cell's references to the new names of other cells."""
  found = {}
  if train.branch_run in new and "train.branch_from" not in changes:
    found["train.branch_from"] = f"{new[train.branch_run]}@{train.branch_step}"
  cell = _own_cell(train.init_run, experiment)
  if cell in new and "train.init_from" not in changes:
    step = "" if train.init_step is None else f"@{train.init_step}"
    found["train.init_from"] = f"{experiment}/{new[cell]}{step}"
  return found


def _in_steps(changes: Mapping[str, Any], config: RunConfig) -> Mapping[str, Any]:
  """Converts TOKENS in `changes` to train.steps, at the batch size they result in."""
  if TOKENS not in changes:
    return changes
  fields = {path: value for path, value in changes.items() if path != TOKENS}
  tokens = changes[TOKENS]
  require("train.steps" not in fields, TOKENS, tokens,
          "conflicts with train.steps: give only one of them")
  batch_tokens = (fields.get("train.batch_size", config.train.batch_size)
                  * fields.get("data.seq_len", config.data.seq_len))
  if batch_tokens < 1:  # the fields' own checks will raise
    return fields
  require(tokens >= batch_tokens, TOKENS, tokens,
          f"must be at least the {batch_tokens} of one batch")
  return fields | {"train.steps": round(tokens / batch_tokens)}


def trunk_and_branches(config: RunConfig, recipe: RunConfig,
                       shares: Sequence[float] = (0.25, 0.5, 1.0)) -> tuple[RunConfig, ...]:
  """Returns a `wsd` trunk, and a branch for each token budget, as cells of a grid.

      def get_grid():
        return Grid("budgets", RECIPE, trunk_and_branches(RECIPE, RECIPE))

  With 1,000 steps and a decay_fraction of 0.2 the trunk takes 800 steps without decay, and the
  branches end after 250, 500 and 1,000 steps, of which they take the last 50, 100 and 200: 1,150
  steps in total instead of 1,750. Each result is bitwise the same as without branching.

  Args:
    config: the longest run; every branch has its decay_fraction.
    recipe: of the grid, which determines the trunk's name.
    shares: budgets as fractions of the steps of `config`. The trunk ends where the decay of the
      longest branch begins.

  Raises:
    FieldError: a share leaves no stable phase after the warm-up.
  """
  def with_train(**fields) -> RunConfig:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **fields))

  alone = [with_train(steps=round(share * config.train.steps)).train for share in shares]
  trunk = with_train(steps=max(run.stable_steps for run in alone), decay_fraction=0.0)
  name = cell_name(trunk, recipe)
  return (trunk, *(with_train(steps=run.steps, branch_from=f"{name}@{run.stable_steps}")
                   for run in alone))


@dataclasses.dataclass(frozen=True)
class Cell:
  """One selected cell.

  Attributes:
    experiment: name of its grid.
    selector: `FILE:CELL`, the `--config` value that selects it, before overrides.
    name: its name after overrides, also of its run directory.
    config: its configuration after overrides.
    residual_ppm: deviation of its exact n_total from the grid's, in parts per million; None
      if the grid has no n_total.
  """

  experiment: str
  selector: str
  name: str
  config: RunConfig
  residual_ppm: float | None = None


def load_grid(path: str) -> Grid:
  """Runs an experiment file and returns its grid.

  Raises:
    FieldError: no such file, no `get_grid` in it, or it raises (the error is quoted).
  """
  file = pathlib.Path(path)
  if file.suffix != ".py" or not os.path.isfile(file):
    folder = file.parent if path.endswith(".py") else pathlib.Path("experiments")
    beside = [str(p) for p in folder.glob("*.py") if p.stem != "__init__" and p.is_file()]
    raise FieldError("config", path, "no such experiment file"
                     + ("; " + did_you_mean(path, beside) if beside else ""))
  module_name = "experiment_" + re.sub(r"\W", "_", str(file.resolve()))
  spec = importlib.util.spec_from_file_location(module_name, file)
  module = importlib.util.module_from_spec(spec)
  sys.modules[module_name] = module  # needed by dataclasses defined in the file
  try:
    spec.loader.exec_module(module)
    require(hasattr(module, "get_grid"), "get_grid", None, "is missing: an experiment "
            "file defines get_grid() -> moe_jax.grid.Grid")
    grid = module.get_grid()
  except FieldError as error:
    raise FieldError("config", path, f"the file gives {error}") from error
  except (Exception, SystemExit) as error:  # any error in a user's file is reported in one line
    line = ""
    for frame in _frames(error.__traceback__):
      if frame.tb_frame.f_code.co_filename == spec.origin:
        line = f":{frame.tb_lineno}"
    message = " ".join(str(error).split())
    raise FieldError("config", path, f"raises at {file.name}{line}: "
                     f"{type(error).__name__}: {message}") from error
  require(isinstance(grid, Grid), "config", path,
          f"get_grid() must return a moe_jax.grid.Grid, not {type(grid).__name__}")
  return grid


def _frames(traceback):
  while traceback is not None:
    yield traceback
    traceback = traceback.tb_next


def select(spec: str, changes: Mapping[str, Any] | None = None) -> tuple[Cell, ...]:
  """The cells selected by `FILE` (all), `FILE:CELL` or `FILE:CELL,CELL`, with overrides applied.

  Raises:
    FieldError: the file, a cell, a field or a value is invalid.
  """
  path, colon, named = spec.partition(":")
  wanted = named.split(",") if colon else []
  require(all(wanted), "config", spec, "must be FILE, FILE:CELL or FILE:CELL,CELL: a name is empty")
  grid = load_grid(path)
  changes = changes or {}
  if wanted:
    grid = grid.only(wanted, changes)
  base_names = grid.names
  try:
    grid = grid.override(changes)
  except FieldError as error:
    if error.field.startswith("grid."):  # not a flag: e.g. the overrides made two cells equal
      raise FieldError("config", spec, f"the overrides give {error}") from None
    raise error.under("config") from None
  cells = tuple(Cell(grid.name, f"{path}:{base}", name, config, _residual_ppm(config, grid))
                for base, name, config in zip(base_names, grid.names, grid.cells, strict=True))
  return cells[:len(set(wanted))] if wanted else cells


def _residual_ppm(config: RunConfig, grid: Grid) -> float | None:
  if grid.n_total is None:
    return None
  return (count.n_total(config.arch) / grid.n_total - 1) * 1e6


def get_config(spec: str, changes: Mapping[str, Any] | None = None) -> RunConfig:
  """The configuration of `FILE:CELL`, for notebooks and tests."""
  cells = select(spec, changes)
  require(len(cells) == 1, "config", spec, f"selects {len(cells)} cells; name one: "
          + ", ".join(cell.name for cell in cells))
  return cells[0].config
