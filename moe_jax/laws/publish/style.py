"""How pictures look: colours told apart with any colour vision, and by marker in grey too."""

import numpy as np

from moe_jax.text import short

# Okabe and Ito's colours; the yellow is left out, as it cannot be read on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "D", "^", "v", "P", "X")
GREY = "#767676"
WIDTH = 9.0  # inches, at 140 dots each: 1260 pixels
DPI = 140
_NAMES = {"n_total": "total parameters  N_total", "n_active": "active parameters  N_active",
          "sparsity": "sparsity  s = n_exp / n_topk", "n_exp": "routed experts  n_exp",
          "tokens": "training tokens  D", "granularity": "granularity  g",
          "core": "core dimensions  l d²"}
_SHORT = {"n_total": "N_total", "n_active": "N_active", "sparsity": "s", "tokens": "D",
          "granularity": "g", "core": "l d²"}
_COUNTS = ("n_total", "n_active", "tokens", "core")


def new_figure(height: float, width: float = WIDTH):
  """An empty figure that no window knows of."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure
  figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
  FigureCanvasAgg(figure)
  return figure


def axis_label(column: str) -> str:
  return _NAMES.get(column, column)


def value_label(column: str, value: float) -> str:
  """`s = 4`, `N_total = 2.01M`."""
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
  """A logarithmic x axis whose ticks are values that occur, thinned where they crowd.

  Args:
    axes: of matplotlib.
    column: what the values are of.
    values: all that must be within the limits.
    margin: beside them, a part of the range.
    panels: how many stand side by side.
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
  """Without those that lie within a part of the range of one that is kept; both ends stay."""
  logs = np.log(levels)
  gap = apart * (logs[-1] - logs[0])
  kept = [levels[0]]
  for level, log in zip(levels[1:-1], logs[1:-1], strict=True):
    if log - np.log(kept[-1]) > gap and logs[-1] - log > gap:
      kept.append(level)
  return np.array([*kept, *levels[1:][-1:]])


def level_of(values: np.ndarray) -> np.ndarray:
  """For each value, the number of its level: values within 10 % of a neighbour share one."""
  order = np.argsort(values, kind="stable")
  steps = np.diff(np.log(values[order])) > np.log(1.1)
  level = np.empty(len(values), int)
  level[order] = np.concatenate([[0], np.cumsum(steps)])
  return level


def level_values(values: np.ndarray) -> np.ndarray:
  """The geometric mean of each level, ascending."""
  level = level_of(values)
  return np.array([np.exp(np.log(values[level == k]).mean()) for k in range(level.max() + 1)])
