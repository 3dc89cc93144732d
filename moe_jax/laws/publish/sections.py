"""Turns an analysis into the sections of a page, for readers who have not seen the code.

To add sections: `publish(path, title, lead, [*law_sections(found, source), Section(...)])`.
"""

import os
import pathlib
from collections.abc import Callable

import numpy as np

from moe_jax.errors import FieldError
from moe_jax.laws import report
from moe_jax.laws.analysis import Analysis
from moe_jax.laws.cells import Cells
from moe_jax.laws.claims import EQUIVALENT, OPPOSITE, REFUSED, SHOWN, UNDECIDED
from moe_jax.laws.forms import form_for
from moe_jax.laws.prediction import reference
from moe_jax.laws.publish import fit_plots, grid_plots
from moe_jax.laws.publish.page import Section, fingerprint
from moe_jax.laws.publish.style import value_label
from moe_jax.laws.publish.table import Table
from moe_jax.laws.publish.tables import (
    cell_table,
    coefficient_table,
    design_table,
    rival_table,
    run_table,
    trust_table,
)
from moe_jax.laws.registry.chinchilla import TOKENS_PER_PARAMETER

_VERDICTS = {SHOWN: "In these data, yes.", OPPOSITE: "In these data, the opposite.",
             EQUIVALENT: "In these data, no effect beyond the margin.",
             UNDECIDED: "Undecided.", REFUSED: "Not identified."}


def title_of(found: Analysis) -> str:
  names = sorted({str(row.get("experiment")) for runs in found.cells.runs for row in runs
                  if row.get("experiment")})
  return "A loss law for mixtures of experts" + (f": {', '.join(names)}" if names else "")


def lead_of(found: Analysis) -> list[str]:
  """Returns the question, and the answer in short."""
  cells = found.cells
  lines = [
      "A mixture-of-experts language model has n_exp experts in each layer and routes every "
      "token to n_topk of them. Models with the same number of parameters, N_total, can have very "
      "different shapes: many or few experts, many or few of them active per token (sparsity "
      "s = n_exp / n_topk), and a core of l layers of width d, which is smaller if there are more "
      "experts. Which shape has the lowest loss?",
      "arXiv 2601.08215 finds that, for a given number of tokens, the loss depends on N_total and "
      "s, and that at equal N_total and s it is slightly higher with more experts. "
      f"{_what_is_done(found)}"]
  lines += [f"- {line}" for line in cautions(cells)]
  for claim, question in zip(found.claims, ("Does sparsity hurt?", "Do more experts hurt, at "
                                            "equal N_total and sparsity?"), strict=False):
    lines.append(f"- {question} {_VERDICTS[claim.verdict]} {claim.sentence}")
  return lines


def _what_is_done(found: Analysis) -> str:
  asked, cells = found.fitted.identified.asked, found.cells
  data = fit_plots.cells_described(cells)
  if not found.claims:
    return (f"This report fits another law to {data}: {asked.formula}. Both claims are about a "
            "log-log law, so they are not tested here.")
  text = (f"This report tests both claims on {data}, with the law "
          f"{form_for(found.claims_law, cells).formula}.")
  return text + ("" if asked.name == found.claims_law else
                 f" Everything else in this report uses the law {asked.formula}.")


def cautions(cells: Cells) -> list[str]:
  """Returns warnings for the reader about too few training tokens per parameter."""
  found = []
  if {"tokens", "n_total"} <= set(cells.columns):
    shares = cells.columns["tokens"] / cells.columns["n_total"]
    if shares.max() < TOKENS_PER_PARAMETER:
      found.append(f"Caution: at most {shares.max():.2g} training tokens per parameter. "
                   "Models trained this briefly differ in how fast they start to learn; they "
                   "validate the method, not the law.")
    elif shares.min() < TOKENS_PER_PARAMETER:
      found.append(f"Caution: {shares.min():.2g} to {shares.max():.2g} training tokens per "
                   "parameter. Part of the apparent effect of N_total comes from how briefly the "
                   "largest models were trained.")
  return found


def law_sections(found: Analysis, source: str | os.PathLike | None = None) -> list[Section]:
  """Builds the sections on data, design, law, trust, rivals and claims.

  A section whose figure cannot be drawn gives the reason.

  Args:
    found: the analysis.
    source: the results file, to name and fingerprint in the last section.
  """
  sections = [_grid(found), _iso(found), _design(found), _law(found), _slices(found),
              _surface(found), _residuals(found), _extrapolation(found), _stability(found)]
  if found.rivals:
    sections += [_rivals(found), _claims(found)]
  return [*sections, _words(), _runs(found, source)]


def _drawn(key: str, title: str, text: list[str], caption: str, draw: Callable, *arguments,
           **more) -> Section:
  """Returns a section with a figure, or with the reason why there is none."""
  try:
    return Section(key, title, tuple(text), draw(*arguments), caption, **more)
  except FieldError as error:
    why = f"Not drawn: {error.field} = {error.value}: {error.accepted}."
    return Section(key, title, (*text, why), **more)


def _grid(found: Analysis) -> Section:
  cells = found.cells
  partial = grid_plots.longest(cells)[1] if "tokens" in cells.columns else ""
  return _drawn(
      "grid", "The grid", [f"- {note}" for note in cells.notes],
      "Each dot is a trained architecture; its color is its loss above that of the best one of "
      "the same N_total. Dots side by side have the same n_exp and n_topk and differ in "
      "granularity. A cross is an architecture without a usable result; the list above gives the "
      "reason. " + partial,
      grid_plots.grid_figure, cells, table=cell_table(found), fold=True)


def _iso(found: Analysis) -> Section:
  partial = grid_plots.longest(found.cells)[1]
  return _drawn(
      "iso-n-total", "Loss at equal N_total", [],
      "All models in a panel have the same N_total. Dots are measured losses, bars one standard "
      "error between seeds, and lines the fitted law at the same cells; they bend where sizes do "
      "not match exactly. Open markers have an unusual granularity. Top: a line for each n_exp. "
      "Bottom: the same cells with a line for each sparsity. " + partial,
      grid_plots.iso_figure, found.fitted)


def _design(found: Analysis) -> Section:
  identified = found.fitted.identified
  text = [
      "Which effects these cells can separate, before any estimate. A coefficient whose variable "
      "hardly varies or is collinear with another is refused; the combination that is identified "
      "is given instead.",
      f"The condition index is {identified.condition:.3g}; values from 30 are harmful."]
  return Section("design", "What the grid can identify", tuple(text), table=design_table(found))


def _law(found: Analysis) -> Section:
  method = next(iter(found.headline.values())).method
  text = [f"Form: {found.fitted.identified.asked.formula}.",
          f"Quote the first interval, two-sided at 95 %: {method}. Its coverage is measured on "
          "simulated grids (python -m benchmarks.law_coverage). The other two are the profile "
          "likelihood, which treats all cells as independent, and rescaled subsamples with the "
          "Huber solver, which is robust to outliers."]
  text += [f"- {line}" for line in report.quality_lines(found.fitted)]
  text += [f"- {name} is REFUSED: these data do not bound it." for name in
           sorted(found.unbounded)]
  text += [f"- {name}: the solvers disagree, so there are outliers or the form does not fit."
           for name in sorted(found.disagreeing)]
  return Section("law", "The fitted law", tuple(text), table=coefficient_table(found))


def _slices(found: Analysis) -> Section:
  if any(part.theta is None for part in found.architectures):
    band = ("There is no band: the law cannot be refitted without one of the architectures.")
  else:
    band = "The band is its two-sided 95 % interval, by a jackknife over architectures."
  return _drawn(
      "slices", "The law along each variable", [],
      "The line is the fitted law with the other variables held at the values above each panel. "
      f"{band} Each cell is drawn at the law's value for its own variable, times its ratio of "
      "measured to fitted loss. Open circles have an unusual granularity.",
      fit_plots.slices_figure, found)


def _surface(found: Analysis) -> Section:
  held = ", ".join(value_label(c, reference(found.cells, c))
                   for c in found.fitted.identified.asked.columns
                   if c not in ("n_exp", "sparsity"))
  return _drawn(
      "surface", "The fitted surface over n_exp and s", [],
      f"Left: the fitted loss at {held}. Right: the half-width of its 95 % interval. "
      "White dots are the measured cells of every N_total; away from them the law extrapolates.",
      fit_plots.surface_figure, found)


def _residuals(found: Analysis) -> Section:
  noise = found.cells.seed_noise
  band = ("The grey band is ± 2 standard deviations between seeds; one is "
          f"{100 * noise:.2g} % of the loss."
          if np.isfinite(noise) else "No cell was repeated with another seed, so it is "
          "unknown how much of this is noise.")
  return _drawn(
      "residuals", "Residuals", [],
      "Ratio of measured to fitted loss minus one, for each cell. A pattern along a variable "
      f"means that the form is wrong in that variable. {band}", fit_plots.residual_figure, found)


def _extrapolation(found: Analysis) -> Section:
  text = ["The law is refitted without the largest models, and without the sparsest, to predict "
          "them:", *[f"- {report.extrapolation_line(part, found.fitted)}"
                     for part in found.held_out]]
  return _drawn(
      "extrapolation", "Extrapolation", text,
      "Grey: cells that the law was fitted to. Diamonds: held-out cells.",
      fit_plots.extrapolation_figure, found)


def _stability(found: Analysis) -> Section:
  return _drawn(
      "stability", "Refits without part of the data", [],
      "Slopes refitted without all cells of one n_exp (squares), and without each architecture in "
      "turn (ticks). The band is the 95 % interval from all cells.",
      fit_plots.stability_figure, found, table=trust_table(found), fold=True)


def _rivals(found: Analysis) -> Section:
  text = ["Other forms fitted to the same cells. Smaller is better in every numeric column except "
          "the first. The last two are prediction errors on held-out cells: all cells of one "
          "architecture, and all cells of one n_exp.",
          *[f"- {line}" for line in report.rival_lines(found)[len(found.rivals):]]]
  return Section("rivals", "Rival forms", tuple(text), table=rival_table(found))


def _claims(found: Analysis) -> Section:
  symbols = {"b_minus_c": "b − c"}
  text = [f"- {claim.name} ({symbols.get(claim.parameter, claim.parameter)} > 0): "
          f"{claim.verdict}. {claim.sentence}" for claim in found.claims]
  mechanism = ((found.mechanism,) if isinstance(found.mechanism, str)
               else found.mechanism.sentences)
  text += ["Why more experts might hurt: they leave fewer core dimensions l d². As "
           "N_active = 4 l d² (1 − 1/s) + N_total/s, fewer core dimensions and fewer active "
           "parameters are confounded at fixed N_total and s, unless the grid separates them. "
           "In this grid:", *[f"- {line}" for line in mechanism]]
  rows = [(c.name, c.parameter, c.verdict,
           *((c.interval.estimate, c.interval.low, c.interval.high, c.equivalence.low,
              c.equivalence.high) if c.interval else (None,) * 5), c.margin.slope)
          for c in found.claims]
  table = Table(("claim", "coefficient", "verdict", "estimate", "95 % low", "95 % high",
                 "90 % low", "90 % high", "margin"), tuple(rows))
  return _drawn(
      "claims", "The claims of arXiv 2601.08215", text,
      "Both claims say that a slope is above 0. If the 95 % interval lies above 0, the claim is "
      "shown; if it lies below 0, the opposite is. If the 90 % interval lies within the grey "
      f"margin ({found.margin}), an effect beyond the margin is excluded. Otherwise the data do "
      "not decide.",
      fit_plots.claims_figure, found, table=table)


def _words() -> Section:
  rows = (("N_total, n_total", "all parameters except the embedding and the output head"),
          ("N_active, n_active", "the part of N_total that one token uses"),
          ("l, d", "layers and width; l d² are the core dimensions"),
          ("n_exp, n_topk", "routed experts per layer; experts per token"),
          ("s", "sparsity, n_exp / n_topk"),
          ("g", "granularity, width d over the hidden width of an expert"),
          ("tokens, D", "training tokens"),
          ("loss", "held-out loss in nats per token, with no token dropped"),
          ("a, b − c, c", "slopes of ln(loss): in −ln N_total, in ln n_exp, in ln s; a slope of "
           "0.01 is 0.7 % of the loss per doubling"),
          ("cell", "one architecture at one number of tokens, averaged over seeds, at the best "
           "learning rate of a sweep"))
  return Section("words", "Glossary", table=Table(("word", "meaning"), rows))


def _runs(found: Analysis, source: str | os.PathLike | None) -> Section:
  text = ["Every number above is computed from these runs alone. The identity is the hash of a "
          "run's whole configuration, the config.json in its directory."]
  if source is not None:
    from etils import epath
    text.append(f"Results file: {pathlib.PurePath(str(source)).name}, SHA-256 "
                f"{fingerprint(epath.Path(source).read_bytes())}…")
  return Section("runs", "The runs", tuple(text), table=run_table(found.cells),
                 fold=True)
