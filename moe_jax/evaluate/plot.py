"""Plots held-out loss against sparsity and against the number of experts."""

import collections
import textwrap
from collections.abc import Sequence

from etils import epath

from moe_jax.evaluate.results import Row
from moe_jax.files import write_bytes
from moe_jax.laws.publish.page import png
from moe_jax.laws.publish.style import COLORS, MARKERS
from moe_jax.laws.registry.chinchilla import TOKENS_PER_PARAMETER
from moe_jax.text import short

_STYLES = tuple(zip(COLORS, MARKERS, strict=True))


def plot(rows: Sequence[Row], path: epath.Path) -> None:
  """Writes `figure` as a PNG."""
  write_bytes(path, png(figure(rows)))


def figure(rows: Sequence[Row]):
  """Plots rows of held-out results in two panels.

  Only runs trained on the same number of tokens are comparable: the runs with the most frequent
  number are shown, and the caption counts the others.
  """
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  shown = equal_tokens(rows)
  made = Figure(figsize=(8, 4.6), dpi=160)
  FigureCanvasAgg(made)
  left, right = made.subplots(1, 2, sharey=True)
  _panel(left, shown, "sparsity", "n_exp", _STYLES)
  _panel(right, shown, "n_exp", "sparsity", _STYLES[3:] + _STYLES[:3])
  left.set_xlabel("sparsity  s = n_exp / n_topk")
  right.set_xlabel("routed experts  n_exp")
  left.set_ylabel("held-out loss (nats per token)")
  made.suptitle(title(shown), fontsize=11, x=0.02, ha="left")
  lines = textwrap.wrap(caption(rows), 118)
  made.text(0.02, 0.02, "\n".join(lines), fontsize=8.5, va="bottom", color="#333333")
  made.subplots_adjust(left=0.09, right=0.985, top=0.9, wspace=0.06,
                       bottom=0.15 + 0.037 * len(lines))
  return made


def equal_tokens(rows: Sequence[Row]) -> list[Row]:
  """Returns the rows with the most frequent number of training tokens, the largest on a tie."""
  counts = collections.Counter(row["tokens"] for row in rows)
  tokens = max(counts, key=lambda t: (counts[t], t))
  return [row for row in rows if row["tokens"] == tokens]


def title(rows: Sequence[Row]) -> str:
  """The experiment, and the model size and training tokens that its runs share."""
  least, most = (choose(row["n_total"] for row in rows) for choose in (min, max))
  middle, spread = (least + most) / 2, (most - least) / (most + least)
  size = f"N_total = {short(middle)}" + (f" ± {spread:.1%}" if spread else "")
  return f"{rows[0]['experiment']}:  {size},  {short(rows[0]['tokens'])} training tokens"


def caption(rows: Sequence[Row]) -> str:
  """What a reader must know to interpret the figure."""
  shown = equal_tokens(rows)
  parts = []
  per_parameter = shown[0]["tokens"] / max(row["n_total"] for row in shown)
  if per_parameter < 1:
    parts.append(f"{per_parameter:.2g} training tokens per parameter: runs this short test "
                 "the pipeline, not the law.")
  elif per_parameter < TOKENS_PER_PARAMETER:
    parts.append(f"{per_parameter:.2g} training tokens per parameter, where compute-optimal dense "
                 f"models have {TOKENS_PER_PARAMETER}.")
  if len({row.get("data_fingerprint") for row in shown}) == 1:
    parts.append(f"Bars: one standard error over the {shown[0]['heldout_documents']} held-out "
                 "documents, which are the same for all cells. A unigram model has loss "
                 f"{shown[0]['unigram_loss']:.3f}.")
  else:
    parts.append("Bars: one standard error over held-out documents. THESE CELLS WERE EVALUATED ON "
                 "DIFFERENT TEXTS: their losses do not compare.")
  if len(shown) < len(rows):
    parts.append(f"Omitted, because trained on another number of tokens: "
                 f"{len(rows) - len(shown)}.")
  return " ".join(parts)


def _panel(axes, rows: Sequence[Row], x: str, line: str, styles) -> None:
  """Plots loss against the column `x`, one line per value of the column `line`."""
  values = sorted({row[line] for row in rows})
  for index, value in enumerate(values):
    color, marker = styles[index % len(styles)]
    aside = 2 ** (0.05 * (index - (len(values) - 1) / 2))  # so that error bars do not overlap
    ours = [row for row in rows if row[line] == value]
    losses = collections.defaultdict(list)
    for row in sorted(ours, key=lambda row: row[x]):
      losses[row[x]].append(row["loss"])
    axes.plot([at * aside for at in losses], [sum(y) / len(y) for y in losses.values()],
              color=color, linewidth=1.5)
    axes.errorbar([row[x] * aside for row in ours], [row["loss"] for row in ours],
                  yerr=[row["loss_se"] or 0 for row in ours], color=color, linestyle="none",
                  marker=marker, markersize=6, capsize=3, elinewidth=1,
                  label=f"{'s' if line == 'sparsity' else line} = {value:.4g}")
  ticks = sorted({row[x] for row in rows})
  axes.set_xscale("log", base=2)
  axes.set_xticks(ticks, [f"{tick:.4g}" for tick in ticks])
  axes.set_xticks([], minor=True)
  axes.set_xlim(ticks[0] / 2**0.4, ticks[-1] * 2**0.4)
  axes.grid(axis="y", color="#dddddd", linewidth=0.8)
  axes.set_axisbelow(True)
  axes.spines[["top", "right"]].set_visible(False)
  axes.legend(fontsize=9, framealpha=1, edgecolor="white")
