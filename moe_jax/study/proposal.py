"""Proposes the next runs of a grid: reads the results, generates candidates, chooses, reports."""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moe_jax.arch import count
from moe_jax.config import RunConfig
from moe_jax.errors import FieldError, require
from moe_jax.grid import Grid, cell_name
from moe_jax.laws.cells import Cells
from moe_jax.laws.exchange import Choice, Pool, Target, choose, reported_half_width
from moe_jax.laws.fit import Fit, fit
from moe_jax.laws.forms import Form, form_for
from moe_jax.laws.identify import TooFew, identify
from moe_jax.laws.information import Noise, design_of
from moe_jax.laws.power import power_of
from moe_jax.laws.reduce import to_cells
from moe_jax.laws.shape import Shape
from moe_jax.laws.table import ARCHITECTURE, Row, read_results
from moe_jax.study import candidates, targets
from moe_jax.study import noise as noise_lib
from moe_jax.study.sample import COLUMNS, variables
from moe_jax.study.so_far import SoFar, so_far
from moe_jax.study.write import write_experiment
from moe_jax.text import aligned, short


@dataclasses.dataclass(frozen=True)
class Ask:
  """A request for runs.

  Attributes:
    law: the form.
    target: a coefficient, `all`, `mean` or `choice`; see moe_jax.study.targets.
    add: maximum number of runs.
    flops: maximum total training FLOPs; None limits only the number of runs.
    region: fields of candidates.Region to override; the rest follow the runs so far.
    seed_sd, architecture_sd: noise to assume instead of estimating it from the runs.
    choice: N_total of the architectures to choose from, and their maximum N_active.
  """

  law: str = "paper"
  target: str = "b_minus_c"
  add: int = 5
  flops: float | None = None
  region: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  seed_sd: float | None = None
  architecture_sd: float | None = None
  choice: tuple[int | None, int | None] = (None, None)


@dataclasses.dataclass(frozen=True)
class Proposal:
  """The runs proposed next.

  Attributes:
    history: the runs so far.
    configs: the proposed runs, best first.
    choice: their rows in the pool, and the target's half-width with each.
    target: what they were chosen to estimate.
    before, after: half-width of the 95 % interval of each identified coefficient, so far and
      with all the proposed runs.
    notes: lines on the runs so far and on the candidates.
  """

  history: SoFar
  configs: tuple[RunConfig, ...]
  choice: Choice
  target: Target
  before: dict[str, float]
  after: dict[str, float]
  notes: tuple[str, ...]

  @property
  def grid(self) -> Grid:
    """The proposed runs as an experiment of the same name and recipe."""
    return Grid(self.history.experiment, self.history.recipe, self.configs)

  def lines(self) -> list[str]:
    """Returns the report as lines of text."""
    rows = [("", "run", "N_total", "n_exp", "s", "g", "tokens", "FLOPs", "alone", "together"),
            ("", "so far", *[""] * 7, self.so_far)]
    for i, (config, alone, together) in enumerate(zip(
        self.configs, self.choice.alone, self.choice.half_width[1:], strict=True), start=1):
      arch = config.arch
      rows.append((str(i), cell_name(config, self.history.recipe),
                   short(count.n_total(arch)), str(arch.n_exp), f"{arch.sparsity:g}",
                   f"{arch.granularity:.3g}", short(config.train.steps * config.batch_tokens),
                   f"{candidates.flops(config):.3g}", _plus_minus(alone),
                   _plus_minus(together)))
    return [*self.notes, f"half-width of the 95 % interval of {self.target.name}, with each run "
            f"alone and with those above it{self._form_grows()}:", *aligned(rows, left=(0, 1)),
            "by coefficient:", *aligned(self._by_coefficient())]

  def _form_grows(self) -> str:
    """Returns a remark if the intervals before and after come from different forms."""
    more = [name for name in self.after if name not in self.before]
    if not self.before or not more:
      return ""
    return (f" (without {' and '.join(more)} so far, with {'it' if len(more) == 1 else 'them'} "
            "after)")

  @property
  def so_far(self) -> str:
    """The target's half-width with the runs so far, as text."""
    before = self.before.get(self.target.name, np.inf)
    return _plus_minus(before if np.isfinite(before) or len(self.before) < len(self.after)
                       else self.choice.half_width[0])

  def _by_coefficient(self) -> list[tuple[str, ...]]:
    names = list(dict.fromkeys([*self.before, *self.after]))
    return [("", "so far", "with all runs")] + [
        (name, *(_plus_minus(known.get(name, np.inf)) for known in (self.before, self.after)))
        for name in names]

  def write(self, path: str) -> None:
    """Writes the runs as an experiment file. Raises FieldError if `path` already exists."""
    write_experiment(path, self.grid, "\n".join([
        f"Runs that are most informative about {self.target.name}, proposed by python -m "
        "moe_jax.study.next.", "",
        f"Expected half-width of the 95 % interval: so far {self.so_far}, with these runs "
        f"{_plus_minus(self.choice.half_width[-1])}.",
        "They belong to the same experiment as the runs so far, and to its results.csv."]))


def _plus_minus(value: float) -> str:
  return f"± {value:.3g}" if np.isfinite(value) else "not identified"


def propose(results: str, ask: Ask, experiment_file: str | None = None,
            where: Sequence[str] = (), without: Sequence[str] = ()) -> Proposal:
  """Chooses the runs that would shrink the target's interval most.

  Raises:
    FieldError: invalid results, configurations or flags; a target that no candidate identifies;
      or a choice that is not in doubt.
  """
  require(ask.add >= 1, "add", ask.add, "must be at least 1")
  rows = read_results(results, where, without)
  cells = to_cells(rows, results)
  used = [row for runs in cells.runs for row in runs]
  history = so_far(used, results, experiment_file)
  config_of = dict(zip([row["cell"] for row in used], history.configs, strict=True))
  done = [config_of[min(runs, key=lambda row: row["loss"])["cell"]] for runs in cells.runs]
  region = candidates.region(done, **ask.region)
  new = candidates.new_cells(region, done)
  configs = [*done, *new.configs]
  everything = _with_new(cells, new.configs)

  asked = form_for(ask.law, cells)
  found = identify(asked, everything)
  fitted = _fitted(cells, ask.law)
  noise = (noise_lib.given(ask.seed_sd, ask.architecture_sd) if fitted is None else
           noise_lib.measured(fitted, ask.seed_sd, ask.architecture_sd))
  whole = design_of(found.form, everything, _theta(found.form, fitted))
  cost = np.array([candidates.flops(config) for config in configs])
  pool = Pool(dataclasses.replace(
      whole, seeds_N=np.concatenate([cells.seeds, np.zeros(len(new.configs))])),
      np.ones(len(cost)) if ask.flops is None else cost)
  notes = [*cells.notes, f"noise: {noise}", f"candidates: {len(new.configs)} new cells and "
           f"repeats of {len(done)}; {region}"]
  notes += [f"  {new.unsolved} combinations have no shape of that size"] if new.unsolved else []
  notes += [f"  {len(new.refused)} are refused, e.g. {new.refused[0]}"] if new.refused else []
  notes += [f"  {name}: not identified even with all candidates: {why}"
            for name, why in found.refused.items()]
  if ask.target == targets.CHOICE:
    doubt = _doubt(ask, region, done, fitted, found.form, noise)
    target, notes = doubt.target, [*notes, *doubt.lines]
  else:
    target = targets.coefficients(ask.target, found.form, found.refused)
  chosen = choose(pool, noise, target, ask.add, np.inf if ask.flops is None else ask.flops)
  reported = reported_half_width(pool, noise, target, list(chosen.added))
  if reported > 1.05 * chosen.half_width[-1]:
    notes.append(f"with all runs moe_jax.laws will report {_plus_minus(reported)}, wider than "
                 "necessary, because it assumes one variance for repeated and single cells")
  grown = dataclasses.replace(everything, seeds=pool.design.seeds_N + np.bincount(
      chosen.added, minlength=len(configs)))
  before, after = (_known(asked, found.form, _theta(found.form, fitted), some, noise)
                   for some in (cells, grown.take(grown.seeds > 0)))
  return Proposal(history, tuple(_runs(chosen.added, configs, rows)), chosen, target, before,
                  after, tuple(notes))


def _known(asked: Form, form: Form, theta: np.ndarray | None, cells: Cells,
           noise: Noise) -> dict[str, float]:
  """Returns the half-widths of the exponents that these cells identify, omitting the others."""
  if asked.is_linear:
    try:
      form, theta = identify(asked, cells).form, None
    except FieldError:  # too few cells
      return {}
  return {one.parameter: one.half_width
          for p, one in enumerate(power_of(design_of(form, cells, theta), noise, margin=1.0))
          if p not in form.intercepts}


def _with_new(cells: Cells, new: Sequence[RunConfig]) -> Cells:
  """Returns the cells so far followed by the new ones, all with a placeholder loss of 1."""
  columns = {name: np.concatenate([cells.columns[name], [variables(c)[name] for c in new]])
             for name in COLUMNS}
  return Cells.of(np.ones(len(cells) + len(new)),
                  architecture=np.stack([columns[name] for name in ARCHITECTURE], axis=1),
                  **columns)


def _fitted(cells: Cells, law: str) -> Fit | None:
  """Fits the law; None if there are too few cells or architectures."""
  try:
    return fit(cells, law)
  except TooFew:
    return None


def _theta(form: Form, fitted: Fit | None) -> np.ndarray | None:
  """Returns the fit's theta if it has this form's parameters, else None.

  Raises:
    FieldError: it does not, and the form is not log-log, so its design depends on theta.
  """
  if fitted is not None and fitted.parameters == form.parameters:
    return fitted.least_squares.theta
  if not form.is_linear:
    raise FieldError("law", form.name, "is not log-log, and the runs so far do not identify it: "
                     "the value of further runs depends on its coefficients; use a log-log "
                     "form, such as paper")
  return None


def _doubt(ask: Ask, region: candidates.Region, done: Sequence[RunConfig], fitted: Fit | None,
           form: Form, noise: Noise) -> targets.Doubt:
  """Target `choice`, over architectures of the requested size with the region's n_exp, s and g."""
  n_total, n_active = ask.choice
  for name, value in (("choice_n_total", n_total), ("choice_n_active", n_active)):
    require(value is not None, name, value, "is needed for --target=choice")
  if fitted is None or fitted.parameters != form.parameters:
    raise FieldError("target", targets.CHOICE, f"the runs so far do not identify {form.name}: "
                     "start with --target=all")
  wide = dataclasses.replace(region, n_total=(n_total,), n_layers=None,
                             aspect=region.aspect or candidates.mean_aspect(done))
  archs = [config.arch for config in candidates.new_cells(wide, done).configs
           if count.n_active(config.arch) <= n_active]
  tokens = float(fitted.cells.columns["tokens"].max())
  if len(archs) < 2:
    raise FieldError("choice_n_active", n_active, f"leaves {len(archs)} architecture"
                     f"{'s' * (not archs)} of N_total {short(n_total)} ({wide}); increase it")
  asked = Fit.cells_of(Shape.of(archs), tokens)
  own = design_of(form, fitted.cells, fitted.least_squares.theta)
  slopes = [p for p in range(len(form.parameters)) if p not in form.intercepts]
  df = min(own.degrees_of_freedom(noise, row) for row in np.eye(len(form.parameters))[slopes])
  doubt = targets.choice(archs, asked, form, fitted.least_squares.theta, own.covariance(noise),
                         df)
  outside = fitted.predict(Shape.of(archs), tokens).outside
  return dataclasses.replace(doubt, lines=(*doubt.lines, *(f"  {line}" for line in outside)))


def _runs(added: Sequence[int], configs: Sequence[RunConfig],
          rows: Sequence[Row]) -> list[RunConfig]:
  """Returns the runs for these rows of the pool; a repeat takes the next unused seed."""
  last: dict[tuple, int] = collections.defaultdict(lambda: -1)
  for row in rows:
    shape = tuple(float(row[name]) for name in ARCHITECTURE)
    last[shape] = max(last[shape], int(float(row["seed_init"])))
  found = []
  for j in added:
    config = configs[j]
    shape = tuple(variables(config)[name] for name in ARCHITECTURE)
    seed = config.seed_init if shape not in last else last[shape] + 1
    last[shape] = seed
    found.append(candidates.like_run(config, config.arch, seed))
  return found
