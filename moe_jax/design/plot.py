"""Plots the Pareto front: predicted loss against inference cost, by memory."""

from collections.abc import Sequence

import numpy as np

from moe_jax.design.answer import Answer
from moe_jax.laws.publish.style import COLORS
from moe_jax.text import short

_STYLES = tuple(zip(COLORS, ("-", "--", "-.", ":"), strict=False))  # distinct in grayscale too
_PARTS = (1.0, 0.5, 0.25, 0.125)  # of the memory budget
# Kind of point -> its label and marker style; a ring keeps what lies below it visible.
_MARKS = {"best": ("the law's best", {"marker": "*", "s": 150, "color": "#000000"}),
          "principle": ("the paper's principle", {"marker": "D", "s": 45, "color": COLORS[4]}),
          "chosen": ("the published model", {"marker": "o", "s": 190, "facecolors": "none",
                                         "edgecolors": "#000000", "linewidths": 1.6})}
_MOST_RATIO = 16  # maximum ratio of largest to smallest inference cost in a panel
_COLUMNS = 3


def pareto_figure(answer: Answer, laws: Sequence[str] | None = None):
  """Plots, in a panel per law, the best predicted loss within each inference cost.

  There is a line for each of several fractions of the memory budget; lower lines have more memory.
  A line steps down where a larger inference budget buys a better architecture, and every corner is
  a point of the Pareto front. Each panel has its own vertical axis: losses of different laws are
  not comparable.

  Args:
    answer: the answer from moe_jax.design.ask.
    laws: names of the laws to show; None shows all of them.

  Returns:
    A matplotlib Figure, with a canvas for PNG.
  """
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  shown = [row for row, r in enumerate(answer.recommendations)
           if laws is None or r.judge.name in laws]
  columns = min(_COLUMNS, len(shown))
  n_rows = -(-len(shown) // columns)
  figure = Figure(figsize=(1.2 + 3.9 * columns if columns > 1 else 7.5, 1.1 + 3.1 * n_rows
                           if columns > 1 else 4.8), dpi=160, layout="constrained")
  FigureCanvasAgg(figure)
  grid = figure.subplots(n_rows, columns, squeeze=False).ravel()
  for axes, row in zip(grid, shown, strict=False):
    _panel(axes, answer, row)
  for axes in grid[len(shown):]:
    axes.set_visible(False)
  budget = answer.found.budgets[1]
  figure.supxlabel(budget.label + ", log scale", fontsize=10)
  figure.supylabel("best predicted loss (nats per token)", fontsize=10)
  handles, labels = grid[0].get_legend_handles_labels()
  figure.legend(handles, labels, loc="outside upper left", ncols=4 if columns > 1 else 3,
                fontsize=9, frameon=False)
  return figure


def stairs(cost_N: np.ndarray, score_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns (costs, scores) of the points better than all cheaper ones, by ascending cost."""
  order = np.lexsort((score_N, cost_N))
  cost_N, score_N = cost_N[order], score_N[order]
  before = np.concatenate([[np.inf], np.minimum.accumulate(score_N)[:-1]])
  better = score_N < before
  return cost_N[better], score_N[better]


def _panel(axes, answer: Answer, row: int) -> None:
  found, r = answer.found, answer.recommendations[row]
  memory, budget = found.budgets[:2]
  within = found.within()
  value = np.vectorize(r.judge.value)
  for part, (color, line) in zip(_PARTS, _STYLES, strict=True):
    inside = within & (found.costs[0] <= part * memory.most * (1 + 1e-9))
    if not inside.any():
      continue
    cost, score = stairs(found.costs[1, inside], found.scores[row, inside])
    axes.step([*cost, budget.most], value([*score, score[-1]]), where="post", color=color,
              linestyle=line, linewidth=1.8, label=f"up to {memory.text(part * memory.most)}")
  points = {"best": r.best, "principle": answer.principle, "chosen": answer.chosen}
  for what, (label, style) in _MARKS.items():
    if points[what] is not None:
      axes.scatter(found.costs[1, points[what]], value(found.scores[row, points[what]]),
                   zorder=5, label=label, **style)
  _dress(axes, answer, row, within)


def _dress(axes, answer: Answer, row: int, within: np.ndarray) -> None:
  """Sets the axes, ticks and limits, zooming in on the informative part of the curves."""
  found, r = answer.found, answer.recommendations[row]
  budget = found.budgets[1]
  least = max(found.costs[1, within].min(), budget.most / _MOST_RATIO)
  axes.set_xscale("log", base=2)
  axes.set_xlim(least / 1.1, budget.most * 1.15)
  ticks = budget.most / 2.0**np.arange(0, 6)
  ticks = ticks[ticks >= least / 1.1]
  axes.set_xticks(ticks, [short(tick) for tick in ticks])
  axes.set_xticks([], minor=True)
  half = found.budgets[0].most / 2
  parts = (within, within & (found.costs[1] <= 1.05 * least), within & (found.costs[0] <= half))
  shown = [*(found.scores[row, part].min() for part in parts if part.any()),
           *(found.scores[row, at] for at in (answer.principle, answer.chosen) if at is not None)]
  room = 0.35 * (max(shown) - min(shown)) + 1e-3
  ends = sorted(r.judge.value(end) for end in (min(shown) - room / 3, max(shown) + room))
  axes.set_ylim(*ends)
  if not r.judge.is_loss:
    axes.set_yscale("log")
    axes.invert_yaxis()
  axes.set_title(r.judge.name + ("" if r.judge.is_loss else ": equal-loss dense FLOPs"),
                 fontsize=10, loc="left")
  axes.grid(color="#dddddd", linewidth=0.8)
  axes.set_axisbelow(True)
  axes.tick_params(labelsize=9)
  axes.spines[["top", "right"]].set_visible(False)
