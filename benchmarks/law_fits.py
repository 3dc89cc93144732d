"""Refits published measurements and prints the results beside the published ones.

    python -m benchmarks.law_fits --chinchilla=chinchilla_svg_extracted_data.csv \
        --gadre=gadre_openlm_scaling_points.csv --tlm26=tlm26_moe_tinystories.csv \
        --li2026=li2026_moe_surpass_dense_bpc.csv --peers

At least one data file is required; --peers also runs the installed public fitters on the dense data
(benchmarks/law_peers.py). The data are not part of this project:
  chinchilla  epoch-research/analyzing-chinchilla, data/svg_extracted_data.csv
  gadre       mlfoundations/scaling: dataset, params, tokens, loss_c4_val
  tlm26       model card h1matthew/tlm26: n_exp, top_k, total_params, active_params, ce
  li2026      arXiv 2506.12119v2, tables 9 to 13: table, N, Na, D, E, K, bpc
"""

import csv

import numpy as np
from absl import flags

from benchmarks import law_peers
from moe_jax import cli
from moe_jax.errors import FieldError
from moe_jax.laws import intervals
from moe_jax.laws.cells import Cells
from moe_jax.laws.fit import Fit, fit, fit_identified
from moe_jax.laws.forms import ONE, Form, curvature, form_for, ln
from moe_jax.laws.identify import identify
from moe_jax.laws.report import slope_line
from moe_jax.laws.validate import f_test

_CHINCHILLA, _GADRE, _TLM26, _LI2026 = (
    flags.DEFINE_string(name, None, "Data file; see the module's docstring.")
    for name in ("chinchilla", "gadre", "tlm26", "li2026"))
_PEERS = flags.DEFINE_bool("peers", False, "Compare with public fitters on dense data.")
_STARTS = flags.DEFINE_integer("starts", 64, "Number of starts of L-BFGS.", lower_bound=8)

# Besiroglu et al. without the five outliers: A, B, E, alpha, beta.
_PUBLISHED_WITHOUT_OUTLIERS = (477.8, 2143.0, 1.8172, 0.3473, 0.3672)
_PUBLISHED_BETA = 0.453


def read(path: str, flag: str, columns: tuple[str, ...]) -> list[dict[str, str]]:
  """Reads the rows of a CSV file. Raises FieldError naming the flag."""
  try:
    with open(path, newline="") as file:
      rows = list(csv.DictReader(file))
  except OSError as error:
    raise FieldError(flag, path, f"cannot be read: {error.strerror}") from None
  missing = [name for name in columns if not rows or name not in rows[0]]
  if missing:
    raise FieldError(flag, path, f"lacks {', '.join(missing)}")
  return rows


def numbers(rows: list[dict[str, str]], column: str) -> np.ndarray:
  return np.array([float(row[column]) for row in rows])


def dense_lines(title: str, fitted: Fit) -> list[str]:
  """Describes both solvers' fits, with A, B and E instead of their logarithms."""
  lines = [f"{title}: {len(fitted.cells)} points"]
  for found in (fitted.huber, fitted.least_squares):
    shown = ", ".join(
        f"{name.removeprefix('ln_')} {np.exp(x) if name.startswith('ln_') else x:.5g}"
        for name, x in zip(fitted.parameters, found.theta, strict=True))
    lines.append(f"  {found.solver:19s} {shown}; mean Huber (delta 1e-3) "
                 f"{found.objective:.6g}, {found.agreeing} of {found.starts} starts agree")
  return lines


def without_outliers(cells: Cells, n: int, starts: int) -> Cells:
  """Removes the point with the largest residual of the Huber fit, n times, refitting each time."""
  for _ in range(n):
    fitted = fit(cells, "chinchilla", n_starts=starts)
    residual = cells.log_loss - fitted.form.log_loss(fitted.huber.theta, cells)
    cells = cells.take(np.arange(len(cells)) != np.argmax(np.abs(residual)))
  return cells


def chinchilla_lines(path: str, starts: int, peers: bool = False) -> list[str]:
  rows = read(path, "chinchilla", ("Model Size", "Training FLOP", "loss"))
  size = numbers(rows, "Model Size")
  cells = Cells.of(numbers(rows, "loss"), n_active=size,
                   tokens=numbers(rows, "Training FLOP") / (6 * size))
  everything = fit(cells, "chinchilla", n_starts=starts)
  lines = dense_lines("chinchilla, all points", everything)
  lines.append(f"  published beta {_PUBLISHED_BETA}")
  without = without_outliers(cells, 5, 8)
  rest = fit(without, "chinchilla", n_starts=starts)
  lines += dense_lines("chinchilla, five outliers left out one at a time", rest)
  lines.append("  published A {}, B {}, E {}, alpha {}, beta {}".format(
      *_PUBLISHED_WITHOUT_OUTLIERS))
  lines += [f"  {name:6s} {interval}" for found in (
      intervals.profile(rest), intervals.subsample(rest, draws=100, solver="huber"))
      for name, interval in found.items()]
  if peers:
    lines += ["", *law_peers.lines("chinchilla, all points", cells, starts, published=True),
              *law_peers.lines("chinchilla, without the five outliers", without, starts,
                               published=True)]
  return lines


def gadre_lines(path: str, starts: int, peers: bool = False) -> list[str]:
  rows = read(path, "gadre", ("dataset", "params", "tokens", "loss_c4_val"))
  lines = []
  for dataset in sorted({row["dataset"] for row in rows}):
    part = [row for row in rows if row["dataset"] == dataset]
    cells = Cells.of(numbers(part, "loss_c4_val"), n_active=numbers(part, "params"),
                     tokens=numbers(part, "tokens"), architecture=numbers(part, "params"))
    lines += dense_lines(f"gadre, trained on {dataset}",
                         fit(cells, "chinchilla", n_starts=starts))
    if peers:
      lines += ["", *law_peers.lines(f"gadre, trained on {dataset}", cells, starts,
                                     published=False)]
  return lines


def tlm26_lines(path: str) -> list[str]:
  rows = read(path, "tlm26", ("n_exp", "top_k", "ce", "total_params", "active_params"))
  cells = Cells.of(numbers(rows, "ce"), n_exp=numbers(rows, "n_exp"),
                   n_topk=numbers(rows, "top_k"), n_total=numbers(rows, "total_params"),
                   n_active=numbers(rows, "active_params"))
  fitted = fit(cells, "paper")
  return ["tlm26, the paper's form (published slope on ln n_exp: -0.0933)"] + [
      "  " + line for line in fitted.identified.lines()
      + [f"{name} {interval}" for name, interval in intervals.bootstrap(fitted).items()]]


def li2026_lines(path: str) -> list[str]:
  """Describes the slope of ln(bits per character) on ln n_topk at fixed size and tokens."""
  rows = read(path, "li2026", ("table", "N", "Na", "D", "E", "K", "bpc"))
  lines = []
  for table, tokens in (("T9", 114e9), ("T11", 130e9)):
    part = [row for row in rows if row["table"] == table and float(row["D"]) == tokens]
    cells = Cells.of(numbers(part, "bpc"), n_total=numbers(part, "N"),
                     n_active=numbers(part, "Na"), n_exp=numbers(part, "E"),
                     n_topk=numbers(part, "K"), tokens=numbers(part, "D"))
    term = {"c0": ONE, "slope": ln("n_topk")}
    straight, curved = (
        fit_identified(identify(Form(f"topk{name}", "ln L = c0 + slope ln n_topk" + name,
                                     (term | more,)), cells), cells)
        for name, more in (("", {}), (" + curvature", {"q": curvature(cells, "n_topk")})))
    test = f_test(straight, curved)
    lines += [f"li2026 {table}, n_total {cells.columns['n_total'][0]:.3g}, tokens {tokens:.3g}:"
              f" average slope on ln n_topk {intervals.profile(straight)['slope']}",
              "  " + slope_line(curved, test.p_value, "slope", "n_topk")]
    report = identify(form_for("paper", cells), cells)
    lines += ["  " + line for line in report.lines()[1:]]
  return lines


def main(overrides: list[str]) -> None:
  cli.no_overrides(overrides)
  given = ((_CHINCHILLA, lambda path: chinchilla_lines(path, _STARTS.value, _PEERS.value)),
           (_GADRE, lambda path: gadre_lines(path, _STARTS.value, _PEERS.value)),
           (_TLM26, tlm26_lines), (_LI2026, li2026_lines))
  if not any(flag.value for flag, _ in given):
    raise FieldError("chinchilla", None, "give at least one data file: --chinchilla, --gadre, "
                     "--tlm26 or --li2026")
  for flag, lines in given:
    if flag.value:
      print("\n".join(lines(flag.value)), flush=True)


if __name__ == "__main__":
  cli.run(main)
