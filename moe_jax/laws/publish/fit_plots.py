"""Plots the fit: the law with its band, its surface, residuals, extrapolation and claims."""

import numpy as np

from moe_jax.errors import FieldError
from moe_jax.laws import prediction
from moe_jax.laws.analysis import Analysis
from moe_jax.laws.cells import Cells
from moe_jax.laws.fit import Fit
from moe_jax.laws.publish import style
from moe_jax.laws.publish.grid_plots import usual_granularity
from moe_jax.laws.publish.style import COLORS, MARKERS
from moe_jax.text import short

_POINTS = 60


def _curve(values: np.ndarray) -> np.ndarray:
  return np.geomspace(values.min(), values.max(), _POINTS)


def drawn_columns(fitted: Fit) -> list[str]:
  """Returns up to four variables that the fitted form has a slope in, the paper's first."""
  order = ("sparsity", "n_exp", "n_total", "tokens")
  found = [c for c in fitted.form.columns if np.ptp(fitted.cells.log(c)) > np.log(1.1)]
  return sorted(found, key=lambda c: order.index(c) if c in order else len(order))[:4]


def slices_figure(found: Analysis):
  """Plots the law, its 95 % band and the cells along each variable, with the others held fixed.

  Each cell is drawn at the law's value for its own x and the fixed others, times its ratio of
  measured to fitted loss (a component-plus-residual plot).

  Raises:
    FieldError: the law has no slope to draw.
  """
  fitted, cells = found.fitted, found.cells
  columns = drawn_columns(fitted)
  if not columns:
    raise FieldError("law", fitted.form.name, "has no variable that varies in these data")
  figure = style.new_figure(3.7, max(4.4, min(style.WIDTH, 0.8 + 2.9 * len(columns))))
  panels = figure.subplots(1, len(columns), sharey=False, squeeze=False)[0]
  usual = usual_granularity(cells)
  for axes, column in zip(panels, columns, strict=True):
    x = _curve(cells.columns[column])
    at = prediction.points(fitted, **{column: x})
    own = prediction.points(fitted, **{column: cells.columns[column]})
    adjusted = np.exp(fitted.log_loss(own) + fitted.residual)
    for which, face in ((usual, COLORS[0]), (~usual, "white")):
      axes.scatter(cells.columns[column][which], adjusted[which], s=22, facecolors=face,
                   edgecolors=COLORS[0], linewidths=0.9, alpha=0.85, zorder=3)
    axes.plot(x, np.exp(fitted.log_loss(at)), color="black", linewidth=1.4, zorder=2)
    try:
      band = prediction.band(fitted, found.architectures, at)
      axes.fill_between(x, band.low, band.high, color=COLORS[5], alpha=0.45, linewidth=0)
    except FieldError:
      pass  # the caption says that there is no band
    style.clean(axes)
    style.log_axis(axes, column, cells.columns[column], panels=len(columns))
    held = [c for c in fitted.identified.asked.columns if c != column]
    axes.set_title(_wrapped([style.value_label(c, prediction.reference(cells, c))
                             for c in held]), fontsize=8.5, color="#444444")
  panels[0].set_ylabel("loss (nats per token)", fontsize=10)
  return figure


def _wrapped(parts: list[str]) -> str:
  return "\n".join(", ".join(parts[i:i + 2]) for i in range(0, len(parts), 2))


def surface_figure(found: Analysis):
  """Plots the fitted loss over n_exp and s at the median N_total, and its interval's half-width.

  Raises:
    FieldError: the law lacks a slope in n_exp or in s, either has one value, or no interval.
  """
  fitted, cells = found.fitted, found.cells
  for column in ("n_exp", "sparsity"):
    if column not in fitted.form.columns:
      raise FieldError("law", fitted.form.name, f"has no separate slope in {column} as fitted: "
                       "there is no surface over n_exp and s to draw")
    if len(style.level_values(cells.columns[column])) < 2:
      raise FieldError("column", column, "has one value: there is no surface to draw")
  n_exp, s = _curve(cells.columns["n_exp"]), _curve(cells.columns["sparsity"])
  grid = np.meshgrid(n_exp, s)
  at = prediction.points(fitted, n_exp=grid[0].ravel(), sparsity=grid[1].ravel())
  band = prediction.band(fitted, found.architectures, at)
  loss = band.loss.reshape(grid[0].shape)
  width = 100 * ((band.high - band.low) / 2 / band.loss).reshape(loss.shape)
  figure = style.new_figure(4.2)
  panels = figure.subplots(1, 2, sharey=True)
  for axes, z, cmap, label in (
      (panels[0], loss, "viridis", "fitted loss (nats per token)"),
      (panels[1], width, "cividis", "half-width of its 95 % interval (% of the loss)")):
    filled = axes.contourf(grid[0], grid[1], z, levels=12, cmap=cmap)
    axes.contour(grid[0], grid[1], z, levels=filled.levels, colors="white", linewidths=0.5)
    axes.scatter(cells.columns["n_exp"], cells.columns["sparsity"], s=30, facecolors="white",
                 edgecolors="black", linewidths=0.8, zorder=3)
    figure.colorbar(filled, ax=axes, label=label, location="top", shrink=0.95)
    style.log_axis(axes, "n_exp", cells.columns["n_exp"], panels=2)
    axes.set_yscale("log")
    axes.tick_params(labelsize=9)
  levels = style.level_values(cells.columns["sparsity"])[-8:]
  panels[0].set_yticks(levels, [f"{v:.3g}" for v in levels])
  panels[0].set_yticks([], minor=True)
  panels[0].set_ylim(s[0] / 1.1, s[-1] * 1.1)
  panels[0].set_ylabel(style.axis_label("sparsity"), fontsize=10)
  return figure


def residual_figure(found: Analysis):
  """Plots the residual of each cell along each variable, with the noise between seeds."""
  fitted, cells = found.fitted, found.cells
  columns = [c for c in ("n_total", "sparsity", "n_exp", "tokens", "granularity")
             if c in cells.columns and np.ptp(cells.log(c)) > np.log(1.3)][:4]
  if not columns:
    raise FieldError("column", "n_total", "no variable varies in these data")
  figure = style.new_figure(3.3, max(4.4, min(style.WIDTH, 0.8 + 2.9 * len(columns))))
  panels = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
  missed = 100 * np.expm1(fitted.residual)
  usual = usual_granularity(cells)
  noise = 200 * cells.seed_noise
  for axes, column in zip(panels, columns, strict=True):
    if np.isfinite(noise):
      axes.axhspan(-noise, noise, color="#ececec", linewidth=0, zorder=0)
    axes.axhline(0, color="black", linewidth=0.8)
    for which, face in ((usual, COLORS[0]), (~usual, "white")):
      axes.scatter(cells.columns[column][which], missed[which], s=24, facecolors=face,
                   edgecolors=COLORS[0], linewidths=0.9, alpha=0.85, zorder=3)
    style.clean(axes)
    style.log_axis(axes, column, cells.columns[column], panels=len(columns))
  panels[0].set_ylabel("measured / fitted loss − 1 (%)", fontsize=10)
  return figure


def extrapolation_figure(found: Analysis):
  """Plots the prediction errors on held-out cells: the largest, the sparsest.

  Raises:
    FieldError: nothing could be held out.
  """
  fitted, cells = found.fitted, found.cells
  parts = [part for part in found.held_out if part.error is not None]
  if not parts:
    raise FieldError("cells", len(cells), "; ".join(part.refusal for part in found.held_out)
                     or "have neither n_total nor sparsity")
  figure = style.new_figure(3.6, max(4.8, min(style.WIDTH, 4.4 * len(parts))))
  panels = figure.subplots(1, len(parts), sharey=True, squeeze=False)[0]
  for axes, part in zip(panels, parts, strict=True):
    rest = cells.take(~part.out)
    fit_error = rest.log_loss - fitted.form.log_loss(part.theta, rest)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.scatter(rest.loss, 100 * np.expm1(fit_error), s=22, color="#a8a8a8",
                 label=f"fitted to these {len(rest)} cells")
    axes.scatter(cells.loss[part.out], 100 * np.expm1(part.error), s=34, marker=MARKERS[2],
                 color=COLORS[1], zorder=3, label=f"predicted: {len(part.error)} cells")
    column, _, value = part.what.partition(" ")
    axes.set_title(f"held out: {style.value_label(column, float(value))}", fontsize=10)
    axes.set_xlabel("measured loss (nats per token)", fontsize=10)
    style.clean(axes)
    axes.legend(fontsize=8.5, framealpha=0.9, edgecolor="white")
  low, high = panels[0].get_ylim()
  panels[0].set_ylim(low, high + 0.22 * (high - low))  # room for the legends
  panels[0].set_ylabel("measured / predicted loss − 1 (%)", fontsize=10)
  return figure


def stability_figure(found: Analysis):
  """Plots the slopes refitted without each n_exp and without each architecture.

  Raises:
    FieldError: the law has no slope to show, or no refit succeeded.
  """
  fitted = found.fitted
  names = [p for p in fitted.parameters if p in (
      "b_minus_c", "c", "slope_n_exp", "slope_sparsity", "a", "alpha", "beta", "e")][:3]
  parts = [part for part in found.n_exps if part.theta is not None]
  refits = [part for part in found.architectures if part.theta is not None]
  if not names or not (parts or refits):
    raise FieldError("law", fitted.form.name, "has no slope that could be refitted without "
                     "part of these data")
  figure = style.new_figure(1.3 + 0.27 * (len(parts) + 2),
                            max(4.4, min(style.WIDTH, 1.4 + 2.9 * len(names))))
  panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
  labels = ["all cells", *[f"without {part.what.replace(' ', ' = ')}" for part in parts],
            *(["without each architecture"] if refits else [])]
  for axes, name in zip(panels, names, strict=True):
    p, whole = fitted.parameters.index(name), found.headline[name]
    axes.axvspan(whole.low, whole.high, color=COLORS[5], alpha=0.3, linewidth=0)
    axes.plot(whole.estimate, 0, "o", color="black")
    axes.plot([part.theta[p] for part in parts], np.arange(len(parts)) + 1, MARKERS[1],
              color=COLORS[1], markersize=6)
    axes.plot([part.theta[p] for part in refits], np.full(len(refits), len(parts) + 1), "|",
              color=COLORS[0], markersize=9)
    axes.set_xlabel(slope_name(name), fontsize=10)
    axes.grid(axis="x", color="#e2e2e2", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)
    axes.locator_params(axis="x", nbins=4)
  panels[0].set_yticks(range(len(labels)), labels)
  panels[0].set_ylim(len(labels) - 0.5, -0.5)
  return figure


def slope_name(parameter: str) -> str:
  return {"b_minus_c": "b − c, slope in ln n_exp", "c": "c, slope in ln s",
          "a": "a, slope in −ln N_total"}.get(parameter, parameter)


def claims_figure(found: Analysis):
  """Plots each claim's estimate, its 95 % and 90 % intervals, and the equivalence margin.

  Raises:
    FieldError: no claim's coefficient is identified.
  """
  shown = [claim for claim in found.claims if claim.interval is not None]
  if not shown:
    raise FieldError("law", found.fitted.form.name, "neither claim's coefficient is identified"
                     if found.claims else "both claims are about a log-log form")
  figure = style.new_figure(1.5 + 0.62 * len(shown), 7.5)
  axes = figure.subplots()
  axes.axvspan(-found.margin.slope, found.margin.slope, color="#dcdcdc", linewidth=0, zorder=0,
               label=f"equivalence margin, {found.margin}")
  axes.axvline(0, color="black", linewidth=0.9)
  for row, claim in enumerate(shown):
    wide, narrow = claim.interval, claim.equivalence
    axes.plot([wide.low, wide.high], [row, row], color=COLORS[0], linewidth=1.6,
              label="95 % interval, two-sided" if row == 0 else None)
    axes.plot([narrow.low, narrow.high], [row, row], color=COLORS[0], linewidth=6,
              solid_capstyle="butt", alpha=0.5,
              label="90 % interval, equivalence test" if row == 0 else None)
    axes.plot(wide.estimate, row, "o", color="black", zorder=3,
              label="estimate" if row == 0 else None)
  axes.set_yticks(range(len(shown)), [f"{c.name}\n{slope_name(c.parameter)}" for c in shown])
  axes.set_ylim(len(shown) - 0.5, -0.5)
  axes.set_xlabel("change of ln(loss) per unit of ln(variable); above 0, the loss increases",
                  fontsize=10)
  axes.grid(axis="x", color="#e2e2e2", linewidth=0.8)
  axes.set_axisbelow(True)
  axes.spines[["top", "right"]].set_visible(False)
  axes.tick_params(labelsize=9.5)
  figure.legend(loc="outside upper center", ncols=2, fontsize=8.5, frameon=False)
  return figure


def cells_described(cells: Cells) -> str:
  """Describes the cells: `45 cells of 45 architectures, N_total 1.98M to 16.2M`."""
  text = f"{len(cells)} cells of {cells.n_architectures} architectures"
  if "n_total" in cells.columns:
    sizes = style.level_values(cells.columns["n_total"])
    text += ", N_total " + " to ".join(map(short, sizes[[0, -1]] if len(sizes) > 1 else sizes))
  return text
