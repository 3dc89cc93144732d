"""Plot style: colorblind-safe colors, with markers that distinguish series in grayscale too."""

import numpy as np

from moe_jax.text import short

# Okabe and Ito's palette without yellow, which is illegible on white.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "D", "^", "v", "P", "X")
GREY = "#767676"
WIDTH = 9.0  # inches; 1260 pixels at 140 DPI
DPI = 140
_NAMES = {"n_total": "total parameters  N_total", "n_active": "active parameters  N_active",
          "sparsity": "sparsity  s = n_exp / n_topk", "n_exp": "routed experts  n_exp",
          "tokens": "training tokens  D", "granularity": "granularity  g",
          "core": "core dimensions  l d²"}
_SHORT = {"n_total": "N_total", "n_active": "N_active", "sparsity": "s", "tokens": "D",
          "granularity": "g", "core": "l d²"}
_COUNTS = ("n_total", "n_active", "tokens", "core")


def new_figure(height: float, width: float = WIDTH):
  """Returns an empty figure that is not registered with pyplot."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure
  figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
  FigureCanvasAgg(figure)
  return figure


def axis_label(column: str) -> str:
  return _NAMES.get(column, column)


def value_label(column: str, value: float) -> str:
  """Formats a value with its name: `s = 4`, `N_total = 2.01M`."""
  return f"{_SHORT.get(column, column)} = {value_text(column, value)}"


def value_text(column: str, value: float) -> str:
  if column in _COUNTS:
    return short(value)
  return f"{value:.2g}" if column == "granularity" else f"{value:.4g}"


def clean(axes) -> None:
  axes.grid(axis="y", color="#e2e2e2", linewidth=0.8)
  axes.set_axisbelow(True)
  axes.spines[["top", "right"]].set_visible(False)
  axes.tick_params(labelsize=9)


def log_axis(axes, column: str, values: np.ndarray, margin: float = 0.07,
             panels: int = 1) -> None:
  """Sets a logarithmic x axis with ticks at values that occur, thinned where they are crowded.

  Args:
    axes: matplotlib axes.
    column: the variable on the axis.
    values: the values that must lie within the limits.
    margin: padding on either side, as a fraction of the (log) range.
    panels: number of panels side by side.
  """
  levels = _thinned(level_values(values), max(0.1, panels / 17))
  axes.set_xscale("log")
  axes.set_xticks(levels, [value_text(column, level) for level in levels])
  axes.set_xticks([], minor=True)
  low, high = np.log(values.min()), np.log(values.max())
  pad = margin * (high - low) if high - low > 0.05 else 0.3
  axes.set_xlim(np.exp(low - pad), np.exp(high + pad))
  label = axis_label(column) if panels < 5 else _SHORT.get(column, column)
  axes.set_xlabel(label, fontsize=10)


def _thinned(levels: np.ndarray, apart: float) -> np.ndarray:
  """Drops levels within a fraction `apart` of the log range of a kept one; keeps both ends."""
  logs = np.log(levels)
  gap = apart * (logs[-1] - logs[0])
  kept = [levels[0]]
  for level, log in zip(levels[1:-1], logs[1:-1], strict=True):
    if log - np.log(kept[-1]) > gap and logs[-1] - log > gap:
      kept.append(level)
  return np.array([*kept, *levels[1:][-1:]])


def level_of(values: np.ndarray) -> np.ndarray:
  """Returns the level index of each value; values within 10 % of a neighbor share a level."""
  order = np.argsort(values, kind="stable")
  steps = np.diff(np.log(values[order])) > np.log(1.1)
  level = np.empty(len(values), int)
  level[order] = np.concatenate([[0], np.cumsum(steps)])
  return level


def level_values(values: np.ndarray) -> np.ndarray:
  """Returns the geometric mean of each level, ascending."""
  level = level_of(values)
  return np.array([np.exp(np.log(values[level == k]).mean()) for k in range(level.max() + 1)])
