"""Plots the measurements: the grid, and the loss at equal N_total."""

import numpy as np

from moe_jax.errors import FieldError
from moe_jax.laws.cells import Cells
from moe_jax.laws.fit import Fit
from moe_jax.laws.publish import style
from moe_jax.laws.publish.style import COLORS, GREY, MARKERS

_MOST_PANELS = 5


def _need(cells: Cells, *columns: str) -> None:
  for column in columns:
    if column not in cells.columns:
      raise FieldError("column", column, "is not in these data")


def longest(cells: Cells) -> tuple[np.ndarray, str]:
  """Returns a mask of the cells with the most training tokens, and a sentence if others exist."""
  if "tokens" not in cells.columns:
    return np.ones(len(cells), bool), ""
  level = style.level_of(cells.columns["tokens"])
  keep = level == level.max()
  if keep.all():
    return keep, ""
  tokens = style.value_text("tokens", float(cells.columns["tokens"][keep].mean()))
  return keep, (f"Only the cells with the most training tokens, {tokens}, are drawn; the other "
                f"{int((~keep).sum())} are not.")


def _sizes(cells: Cells) -> list[tuple[float, np.ndarray]]:
  """Returns (N_total, mask) for each size, or only for the largest if there are too many."""
  level = style.level_of(cells.columns["n_total"])
  values = style.level_values(cells.columns["n_total"])
  return [(value, level == k) for k, value in enumerate(values)][-_MOST_PANELS:]


def grid_figure(cells: Cells):
  """Plots which n_exp and n_topk were trained at each N_total, colored by loss.

  Raises:
    FieldError: the data lack a variable.
  """
  _need(cells, "n_total", "n_exp", "n_topk")
  cells = cells.take(longest(cells)[0])
  sizes = _sizes(cells)
  lost = _lost(cells)
  every = {name: np.append(cells.columns[name], [row[name] for row in lost])
           for name in ("n_exp", "n_topk")}
  above = [100 * (cells.loss[mask] / cells.loss[mask].min() - 1) for _, mask in sizes]
  most = max(values.max() for values in above)
  figure = style.new_figure(3.6, max(5.4, min(style.WIDTH, 1.6 + 2.5 * len(sizes))))
  panels = figure.subplots(1, len(sizes), sharey=True, squeeze=False)[0]
  for axes, (size, mask), values in zip(panels, sizes, above, strict=True):
    dots = _grid_panel(axes, cells.take(mask), values, most,
                       [row for row in lost if abs(np.log(row["n_total"] / size)) < np.log(1.1)])
    style.log_axis(axes, "n_exp", every["n_exp"], 0.16, len(sizes))
    axes.set_title(style.value_label("n_total", size), fontsize=10)
  levels = style.level_values(every["n_topk"])
  for axes in panels:
    axes.set_yscale("log")
    axes.set_yticks(levels, [f"{v:.4g}" for v in levels])
    axes.set_yticks([], minor=True)
    axes.set_ylim(levels[0] / 1.6, levels[-1] * 1.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)
    _sparsities(axes, every["n_exp"] / every["n_topk"], len(levels) > 1 and len(sizes) < 5)
  panels[0].set_ylabel("experts per token  n_topk", fontsize=10)
  if most:  # 0 if every panel has a single cell
    figure.colorbar(dots, ax=list(panels), label="loss above the panel's best (%)", pad=0.015)
  return figure


def _lost(cells: Cells) -> list[dict[str, float]]:
  """Returns the architectures with no used run, where the rows give their full shape."""
  names = ("n_exp", "n_topk", "n_total")
  found = {tuple(float(row[name]) for name in (*names, "d_expert")) for row in cells.unused
           if all(isinstance(row.get(name), float) and row[name] > 0
                  for name in (*names, "d_expert"))}
  used = set(zip(*(cells.columns[name] for name in (*names, "d_expert")), strict=True)
             ) if "d_expert" in cells.columns else set()
  return [dict(zip(names, values, strict=False)) for values in sorted(found - used)]


def _grid_panel(axes, cells: Cells, above: np.ndarray, most: float, lost: list[dict]):
  """Draws dots for cells and crosses for lost architectures, coinciding ones side by side."""
  x, y = (np.append(cells.columns[name], [row[name] for row in lost])
          for name in ("n_exp", "n_topk"))
  seen: dict[tuple, int] = {}
  for i, pair in enumerate(zip(x, y, strict=True)):
    seen[pair] = seen.get(pair, -1) + 1
    x[i] *= 1.17**seen[pair]
  n = len(cells)
  axes.scatter(x[n:], y[n:], marker="x", s=60, color=COLORS[1], linewidths=1.8, zorder=4)
  return axes.scatter(x[:n], y[:n], c=above, s=85, vmin=0, vmax=most, cmap="viridis",
                      edgecolors="black", linewidths=0.6, zorder=3)


def _sparsities(axes, sparsities: np.ndarray, named: bool) -> None:
  """Draws thin lines of equal sparsity across the panel, labeled where they leave it."""
  (left, right), top = axes.get_xlim(), axes.get_ylim()[1]
  levels = style.level_values(sparsities)
  few = len(levels) <= 4  # otherwise labels at the upper edge would overlap
  for s in levels:
    end = min(right, top * s)
    axes.plot([left, end], [left / s, end / s], color="#cccccc", linewidth=0.8, zorder=1)
    if named and (end == right or few):
      axes.annotate(f"s = {s:.3g}", (end, end / s), (-3, 0), textcoords="offset points",
                    fontsize=7.5, color=GREY, ha="right", va="bottom", zorder=2)
  axes.set_xlim(left, right)
  axes.set_ylim(top=top)


def iso_figure(fitted: Fit):
  """Plots loss at equal N_total: against s with a line for each n_exp, and vice versa.

  Dots are measured, lines are the law at the same cells; open markers have an unusual granularity.

  Raises:
    FieldError: the data lack a variable, or no two cells have the same N_total.
  """
  cells = fitted.cells
  _need(cells, "n_total", "n_exp", "sparsity")
  cells = cells.take(longest(cells)[0])
  sizes = [(size, mask) for size, mask in _sizes(cells) if mask.sum() > 1]
  if not sizes:
    raise FieldError("n_total", len(style.level_values(cells.columns["n_total"])),
                     "sizes, none with two cells: nothing to compare at equal N_total")
  figure = style.new_figure(6.4, max(6.0, min(style.WIDTH, 1.4 + 2.7 * len(sizes))))
  panels = figure.subplots(2, len(sizes), squeeze=False, sharey="col")
  for row, (x, by) in enumerate((("sparsity", "n_exp"), ("n_exp", "sparsity"))):
    styles = _styles(cells.columns[by])
    for column, (size, mask) in enumerate(sizes):
      axes = panels[row, column]
      _lines(axes, fitted, cells.take(mask), x, by, styles)
      style.clean(axes)
      style.log_axis(axes, x, cells.columns[x], panels=len(sizes))
      if row == 0:
        axes.set_title(style.value_label("n_total", size), fontsize=10)
      if column == 0:
        axes.set_ylabel("loss (nats per token)", fontsize=10)
    handles = [_handle(value, by, *look) for value, look in styles.items()]
    panels[row, -1].legend(handles=handles, fontsize=8.5, loc="center left",
                           bbox_to_anchor=(1.01, 0.5), frameon=False)
  return figure


def _styles(values: np.ndarray) -> dict[float, tuple[str, str]]:
  levels = style.level_values(values)
  return {level: (COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)])
          for i, level in enumerate(levels)}


def _handle(value: float, by: str, color: str, marker: str):
  from matplotlib.lines import Line2D
  return Line2D([], [], color=color, marker=marker, linewidth=1.2, markersize=5.5,
                label=style.value_label(by, value))


def usual_granularity(cells: Cells) -> np.ndarray:
  """Returns a mask of the cells within 25 % of the most common granularity."""
  if "granularity" not in cells.columns:
    return np.ones(len(cells), bool)
  logs = cells.log("granularity")
  near = np.abs(logs[:, None] - logs[None, :]) < np.log(1.25)
  return near[np.argmax(near.sum(axis=1))]


def _lines(axes, fitted: Fit, cells: Cells, x: str, by: str, styles) -> None:
  usual = usual_granularity(cells)
  law = np.exp(fitted.log_loss(cells))
  error = np.nan_to_num(cells.loss_se)
  at = cells.columns[x] * _apart(cells, by, styles)
  for value, (color, marker) in styles.items():
    ours = np.abs(np.log(cells.columns[by] / value)) < np.log(1.1)
    order = np.flatnonzero(ours & usual)
    order = order[np.argsort(at[order], kind="stable")]
    axes.plot(at[order], law[order], color=color, linewidth=1.2, alpha=0.75)
    for which, face in ((ours & usual, color), (ours & ~usual, "white")):
      axes.errorbar(at[which], cells.loss[which], yerr=error[which], linestyle="none",
                    marker=marker, markersize=5.5, color=color, markerfacecolor=face,
                    elinewidth=0.9, capsize=2, zorder=3)


def _apart(cells: Cells, by: str, styles) -> np.ndarray:
  """Returns small factors on x that keep the markers of different lines from overlapping."""
  levels = np.array(list(styles))
  index = np.argmin(np.abs(np.log(cells.columns[by][:, None] / levels)), axis=1)
  return 1.045**(index - (len(levels) - 1) / 2)
