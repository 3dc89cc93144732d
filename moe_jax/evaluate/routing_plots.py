"""Figures and tables of routing statistics, from the eval/routing.json of each cell. No JAX."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moe_jax.laws.publish import style
from moe_jax.laws.publish.table import Table

Found = Mapping[str, Mapping[str, Any]]  # cell -> eval/routing.json
Steps = Mapping[str, Sequence[Mapping[str, Any]]]  # cell -> the same for its checkpoints, by step

_COLUMNS = 3  # panels side by side
_MOST_PANELS = 9
_NEVER = 2**-4  # smaller values are drawn as this, since log2(0) is undefined


def load_figure(found: Found):
  """Heat maps of load over the mean, a panel per cell: rows are layers and domains."""
  panels = _Panels(found, 0.28 * max(map(_n_rows, found.values())) + 1.1)
  for axes, result in panels.cells():
    load_RE = np.array(result["load"]).reshape(-1, np.array(result["load"]).shape[-1])
    image = axes.imshow(np.log2(np.maximum(load_RE, _NEVER)), aspect="auto", cmap="RdBu_r",
                        vmin=-2, vmax=2, interpolation="nearest")
    labels = [f"layer {layer}" + (f" {label}" if len(result["domains"]) > 1 else "")
              for layer in result["layers"] for label in result["domains"]]
    axes.set_yticks(range(len(labels)), labels, fontsize=7)
    axes.set_xlabel("expert", fontsize=8)
    axes.tick_params(axis="x", labelsize=7)
    axes.locator_params(axis="x", integer=True)
  bar = panels.figure.colorbar(image, ax=panels.axes, pad=0.015, label="load over the mean",
                               ticks=[-2, -1, 0, 1, 2])
  bar.ax.set_yticklabels(["¼ or less", "½", "1", "2", "4 or more"])
  return panels.figure


def company_figure(found: Found):
  """Heat maps, a panel per cell, of how often two experts share a token, relative to chance."""
  panels = _Panels(found, 2.7)
  for axes, result in panels.cells():
    image = axes.imshow(np.log2(np.maximum(lift(result), _NEVER)), cmap="RdBu_r", vmin=-2, vmax=2,
                        interpolation="nearest")
    axes.set_xlabel(f"expert, layer {result['layers'][-1]}", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.locator_params(integer=True)
  bar = panels.figure.colorbar(image, ax=panels.axes, pad=0.015, label="together, over chance",
                               ticks=[-2, -1, 0, 1, 2])
  bar.ax.set_yticklabels(["¼ or less", "½", "1", "2", "4 or more"])
  return panels.figure


def lift(result: Mapping[str, Any]) -> np.ndarray:
  """Returns lift_EE of the last layer: P(j | i) over its value by chance; NaN on the diagonal.

  By chance means that a token of expert i would choose its n_topk - 1 other experts in proportion
  to their load. NaN also where that probability is 0.
  """
  company_EE = np.array(result["coactivation"][-1])
  load_GE = np.array(result["load"][-1])
  share_E = np.average(load_GE, axis=0, weights=np.array(result["tokens"]))
  share_E = share_E / share_E.sum()
  others_E = company_EE.sum(1) - np.diagonal(company_EE)
  chance_EE = others_E[:, None] * share_E / np.maximum(1 - share_E[:, None], 1e-9)
  with np.errstate(divide="ignore", invalid="ignore"):
    lift_EE = np.where(chance_EE > 0, company_EE / chance_EE, np.nan)
  np.fill_diagonal(lift_EE, np.nan)
  return lift_EE


def training_figure(steps: Steps):
  """Plots routing statistics, averaged over layers, against step; one curve per cell."""
  quantities = [(name, label) for name, label in (
      ("token_information", "token information"),
      ("domain_information", "domain information"),
      ("agreement", "choices as in the newest checkpoint"), ("entropy", "entropy (nats)"))
      if any(result.get(name) is not None for ours in steps.values() for result in ours)]
  made = style.new_figure(3.1 * math.ceil(len(quantities) / 2))
  panels = made.subplots(math.ceil(len(quantities) / 2), min(2, len(quantities)), squeeze=False)
  for axes, (name, label) in zip(panels.ravel(), quantities, strict=False):
    for number, (cell, ours) in enumerate(steps.items()):
      ours = [result for result in ours if result.get(name) is not None]
      axes.plot([result["step"] for result in ours], [mean(result, name) for result in ours],
                label=cell, color=style.COLORS[number % len(style.COLORS)], linewidth=1.4,
                marker=style.MARKERS[number % len(style.MARKERS)], markersize=4)
    axes.set_title(label, fontsize=10, loc="left")
    axes.set_xlabel("step", fontsize=9)
    style.clean(axes)
  for axes in panels.ravel()[len(quantities):]:
    axes.set_axis_off()
  made.legend(*panels[0, 0].get_legend_handles_labels(), fontsize=8, ncols=3,
              loc="outside lower center", frameon=False)
  return made


def mean(result: Mapping[str, Any], name: str) -> float:
  """Averages over layers, and over domains weighted by their tokens."""
  value = np.array(result[name], float)
  if value.ndim == 2:
    value = np.average(value, axis=1, weights=result["tokens"])
  return float(value.mean())


def table(found: Found) -> Table:
  """One row per cell, layer and domain."""
  rows = []
  for cell, result in found.items():
    for i, layer in enumerate(result["layers"]):
      for g, label in enumerate(result["domains"]):
        load_E = np.array(result["load"][i][g])
        rows.append((cell, layer, label, result["tokens"][g], result["entropy"][i][g],
                     float(load_E.std()), float(load_E.max()), int((load_E == 0).sum()),
                     result["drop_rate"][i][g], _at(result["token_information"], i),
                     _at(result["domain_information"], i)))
  return Table(("cell", "layer", "domain", "tokens", "entropy", "load variation", "max load",
                "dead experts", "drop rate", "token information", "domain information"),
               tuple(rows))


def _at(values, index):
  return None if values is None else values[index]


def _n_rows(result) -> int:
  return len(result["layers"]) * len(result["domains"])


class _Panels:
  """A grid of panels, one per cell with the cell's name above it; at most _MOST_PANELS."""

  def __init__(self, found: Found, height: float):
    self._found = dict(list(found.items())[:_MOST_PANELS])
    rows = math.ceil(len(self._found) / _COLUMNS)
    self.figure = style.new_figure(min(height, 12 / rows) * rows)
    self.axes = self.figure.subplots(rows, min(_COLUMNS, len(self._found)), squeeze=False)

  def cells(self):
    for axes in self.axes.ravel()[len(self._found):]:
      axes.set_axis_off()
    for axes, (cell, result) in zip(self.axes.ravel(), self._found.items(), strict=False):
      axes.set_title(cell, fontsize=8)
      yield axes, result
