"""Tests by paired runs whether a difference in training changes the slopes of a law.

    python -m moe_jax.study.paired --results=runs/study/results.csv --of=tokens \\
        --values=24968192,99975168
    python -m moe_jax.study.paired --results=runs/a/results.csv --results=runs/b/results.csv \\
        --of=dispatch --values=capacity,dropless

Two runs of one architecture with the same seeds form a pair. A log-log form is fitted to the
difference in ln L, second minus first; its coefficients are the changes of the slopes. Whatever
the two runs share cancels, including the architecture effect that the law misses.
"""

import collections
from collections.abc import Sequence

import numpy as np
from absl import flags

from moe_jax import cli
from moe_jax.errors import FieldError, require
from moe_jax.laws import intervals
from moe_jax.laws.cells import Cells
from moe_jax.laws.fit import Fit, fit
from moe_jax.laws.flags import define_law_flag, define_rows_flags
from moe_jax.laws.table import ARCHITECTURE, DETAILS, RECIPE, UNUSED, Row, read_results
from moe_jax.text import aligned

_RESULTS = flags.DEFINE_multi_string("results", None, "results.csv of an experiment; may be "
                                     "repeated.", required=True)
_OF = flags.DEFINE_string("of", "tokens", "The column in which the two runs of a pair differ.")
_VALUES = flags.DEFINE_list("values", None, "Its two values: FIRST,SECOND.", required=True)
_LAW = define_law_flag("The log-log form to fit")
_WHERE, _WITHOUT = define_rows_flags()

_ALIKE = ("seed_init", "seed_data")


def main(overrides: list[str]) -> None:
  cli.no_overrides(overrides)
  require(len(set(_VALUES.value)) == 2 == len(_VALUES.value), "values", ",".join(_VALUES.value),
          "must be two different values, FIRST,SECOND")
  rows = read_results(_RESULTS.value, _WHERE.value, _WITHOUT.value)
  cells = pairs(rows, _OF.value, *_VALUES.value)
  fitted = fit(cells, _LAW.value)
  require(fitted.form.is_linear, "law", _LAW.value, "must be a log-log form, such as paper")
  print("\n".join(lines(fitted)))


def pairs(rows: Sequence[Row], of: str, first: str, second: str) -> Cells:
  """Returns a cell for each architecture; its loss is the ratio of losses, second to first.

  Ratios are averaged over seeds in ln L.

  Raises:
    FieldError: no such column, a value that no run has, two runs with the same value and seeds,
      no pair, or pairs of several lengths.
  """
  used = [row for row in rows if UNUSED not in row]
  require(all(of in row for row in used), "of", of, "is not a column of all the results")
  ours: dict[tuple, dict[str, Row]] = collections.defaultdict(dict)
  for value in (first, second):
    some = [row for row in used if _is(row[of], value)]
    require(bool(some), "values", value, f"no run has this value of {of}; available: "
            + ", ".join(sorted({_shown(row[of]) for row in used})[:8]))
    for row in some:
      key = tuple(row[name] for name in (*ARCHITECTURE, *_ALIKE)
                  + (() if of == "tokens" else ("tokens",)))
      other = ours[key].setdefault(value, row)
      require(other is row, "results", row["cell"], f"and {other['cell']} both have {of} "
              f"{value} and the same seeds: choose with --where or --without")
  paired: dict[tuple, list[tuple[Row, Row]]] = collections.defaultdict(list)
  for key, found in ours.items():
    if len(found) == 2:
      paired[key[:len(ARCHITECTURE)]].append((found[first], found[second]))
  if not paired:
    raise FieldError("values", f"{first},{second}", "no architecture has runs of both values with "
                     "the same seeds")
  lengths = {key[-1] for key, found in ours.items() if len(found) == 2}
  require(of == "tokens" or len(lengths) == 1, "where", "", f"is needed: the pairs have "
          f"{len(lengths)} lengths, and a fit needs a single one: choose with --where=tokens="
          f"{_shown(max(lengths))}")
  alone = [row["cell"] for found in ours.values() if len(found) == 1 for row in found.values()]
  both = [pair for group in paired.values() for pair in group]
  differ = [name for name in (*RECIPE, *DETAILS, "learning_rate") if name != of
            and any(str(one.get(name)) != str(two.get(name)) for one, two in both)]
  notes = [f"{len(both)} pairs of {len(paired)} architectures: {of} {second} against {first}"]
  notes += [f"without a partner: {', '.join(alone)}"] if alone else []
  notes += [f"THE PAIRS ALSO DIFFER IN {', '.join(differ)}"] if differ else []
  logs = [np.mean([np.log(two["loss"] / one["loss"]) for one, two in group])
          for group in paired.values()]
  values = np.array(list(paired))
  return Cells.of(np.exp(logs), names=tuple(group[0][0]["cell"] for group in paired.values()),
                  architecture=values, seeds=[len(group) for group in paired.values()],
                  notes=tuple(notes), **dict(zip(ARCHITECTURE, values.T, strict=True)))


def _shown(value: object) -> str:
  return f"{value:.12g}" if isinstance(value, float) else str(value)


def _is(found: object, value: str) -> bool:
  try:
    return float(found) == float(value)
  except ValueError:
    return str(found) == value


def lines(fitted: Fit) -> list[str]:
  """Returns the lines the command prints: the change of each slope, with 95 % intervals."""
  change = 100 * np.expm1(np.mean(fitted.cells.log_loss))
  found, by_pair = intervals.bootstrap(fitted), intervals.by_pair(fitted)
  rows = [("change of", "estimate", "95 % interval", *(("clustered by (n_exp, s)",) if by_pair
                                                        else ()))]
  for p, (name, one) in enumerate(found.items()):
    if p not in fitted.form.intercepts:
      rows.append((name, f"{one.estimate:+.4f}", *(
          f"[{each.low:+.4f}, {each.high:+.4f}]" for each in (one, by_pair.get(name)) if each)))
  return [*fitted.cells.notes, f"the loss changes by {change:+.2f} % on average",
          *(f"{name}: not identified, {why}" for name, why in fitted.identified.refused.items()),
          *aligned(rows), f"residual standard deviation {100 * fitted.scatter:.2f} % of the loss"]


if __name__ == "__main__":
  cli.run(main)
