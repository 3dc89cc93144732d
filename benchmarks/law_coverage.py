"""How often the 95 % intervals of a fit cover the truth, over grids with a planted law.

    OMP_NUM_THREADS=1 python -m benchmarks.law_coverage --grids=2000
    OMP_NUM_THREADS=1 python -m benchmarks.law_coverage --grids=300 --law=paper-tokens

(These matrices are small: more threads make it slower.)

Each grid is drawn anew: shapes, coefficients, noise between seeds, and learning rates that
miss their optimum. Rows pass through everything that a
results.csv passes: the sweep's envelope, the seeds, the design report, the fit.
"""

import collections
import math

import numpy as np
from absl import app, flags

from moe_jax.errors import FieldError
from moe_jax.laws import intervals
from moe_jax.laws.fit import fit
from moe_jax.laws.reduce import to_cells
from moe_jax.laws.table import Row

NOISE = 0.002  # of ln L, between seeds
LR_CURVATURE = 0.02  # of ln L, a unit of ln(learning rate) squared
_NUISANCE = ("c0", "d")  # they take up what learning rates cost on average
SCENARIOS = {
    "swept": dict(learning_rates=5, seeds=1, drift=0.15),
    "swept, two seeds": dict(learning_rates=5, seeds=2, drift=0.15),
    "one learning rate": dict(learning_rates=1, seeds=1),
    "several tokens": dict(learning_rates=5, seeds=1, tokens=(1e9, 4e9, 1.6e10)),
    "several tokens, one learning rate": dict(learning_rates=1, seeds=1,
                                              tokens=(1e9, 4e9, 1.6e10)),
    # No interval can know of this bias: the reason to sweep.
    "one learning rate, its best moves": dict(learning_rates=1, seeds=1, drift=0.3),
}


def shapes(rng: np.random.Generator, n_cells: int) -> list[dict]:
  """Shapes of three sizes with granularity 4, n_exp 8 to 128 and n_topk 1 to 8."""
  found = {}
  while len(found) < n_cells:
    size = rng.choice([3e7, 1e8, 3e8])
    n_exp, n_topk = int(rng.choice([8, 16, 32, 64, 128])), int(rng.choice([1, 2, 4, 8]))
    per_layer = 4 + 3 * n_exp / 4
    d_model = 8 * round((size * 64 / per_layer)**(1 / 3) / 8)
    n_layers = max(2, round(size / per_layer / d_model**2))
    core = n_layers * d_model**2
    found[size, n_exp, n_topk] = dict(
        n_layers=n_layers, d_model=d_model, d_expert=d_model // 4, n_exp=n_exp, n_topk=n_topk,
        n_total=core * per_layer, n_active=core * (4 + 3 * n_topk / 4))
  return list(found.values())


def truth(rng: np.random.Generator) -> dict[str, float]:
  """Coefficients of the paper's form, with tokens and an irreducible term beside it."""
  return {"c0": 3.0, "a": rng.uniform(0.05, 0.12), "b_minus_c": rng.uniform(-0.01, 0.02),
          "c": rng.uniform(0.0, 0.03), "d": 0.05,
          "ln_A": math.log(200), "ln_B": math.log(400), "beta": 0.28, "ln_E": math.log(1.6)}


def planted_log_loss(law: str, x: dict, coefficients: dict[str, float]) -> float:
  """ln L without noise: of the log-log form, or of the one with an irreducible term."""
  t = coefficients
  shape = t["b_minus_c"] * math.log(x["n_exp"]) + t["c"] * math.log(x["n_exp"] / x["n_topk"])
  if law == "paper":
    return t["c0"] - t["a"] * math.log(x["n_total"]) + shape - t["d"] * math.log(x["tokens"])
  return math.log(math.exp(t["ln_E"]) + math.exp(t["ln_B"] - t["beta"] * math.log(x["tokens"]))
                  + math.exp(t["ln_A"] - 3 * t["a"] * math.log(x["n_total"]) + 3 * shape))


def planted_rows(rng: np.random.Generator, coefficients: dict[str, float], law: str = "paper",
                 n_cells: int = 24, learning_rates: int = 5, seeds: int = 1,
                 tokens: tuple[float, ...] = (9e9,), noise: float = NOISE,
                 drift: float = 0.0) -> list[Row]:
  """Rows of a results table.

  The nominal learning rate misses the best one by a factor e^N(0, 0.3); the best one also
  goes as (s / 4)^-drift.
  """
  rows = []
  for shape in shapes(rng, n_cells):
    miss = 0.3 * rng.standard_normal() + drift * math.log(shape["n_exp"] / shape["n_topk"] / 4)
    for n_tokens in tokens:
      x = shape | {"tokens": n_tokens}
      for k in range(learning_rates):
        step = (k - (learning_rates - 1) / 2) * math.log(2)
        mean = planted_log_loss(law, x, coefficients) + LR_CURVATURE * (step + miss)**2
        for seed in range(seeds):
          rows.append(x | {
              "cell": f"l{x['n_layers']}-d{x['d_model']}-e{x['n_exp']}-k{x['n_topk']}",
              "state": "finished", "seed_init": float(seed), "seed_data": 0.0,
              "learning_rate": 1e-3 * math.exp(step),
              "loss": math.exp(mean + noise * rng.standard_normal())})
  return rows


def coverage(law: str, grids: int, n_cells: int = 24, seed: int = 0, draws: int = 399,
             **scenario) -> dict[tuple[str, str], tuple[int, int]]:
  """How many grids' intervals cover the truth, of how many.

  The Huber solver's intervals, by far the slowest, are looked at on every fifth grid.

  Returns:
    {(method, parameter): (covered, grids that could be fitted)}.
  """
  covered, counted = collections.Counter(), collections.Counter()
  for grid in range(grids):
    rng = np.random.default_rng([seed, grid])
    planted = truth(rng)
    try:
      cells = to_cells(planted_rows(rng, planted, law, n_cells, **scenario))
      fitted = fit(cells, law, n_starts=8, seed=grid)
    except FieldError:
      continue
    expected = planted if law == "paper" else planted | {
        name: 3 * planted[name] for name in ("a", "b_minus_c", "c")}
    found = [intervals.bootstrap(fitted, draws=draws, seed=grid), intervals.profile(fitted)]
    if grid % 5 == 0:
      found.append(intervals.subsample(fitted, draws=100, seed=grid, solver="huber"))
    for name, interval in (pair for by_name in found for pair in by_name.items()):
      if name in expected and name not in _NUISANCE:
        counted[interval.method, name] += 1
        covered[interval.method, name] += interval.covers(expected[name])
  return {key: (covered[key], n) for key, n in counted.items()}


def table(law: str, grids: int, n_cells: int, names: list[str]) -> list[str]:
  """A Markdown table: a line for each scenario, method and parameter."""
  lines = ["| scenario | interval | coefficient | covered | grids |", "|---|---|---|---|---|"]
  for name in names:
    found = coverage(law, grids, n_cells, **SCENARIOS[name])
    lines += [f"| {name} | {method} | {parameter} | {100 * hits / n:.1f} % | {n} |"
              for (method, parameter), (hits, n) in found.items()]
  return lines


def main(_) -> None:
  names = _SCENARIO.value or [name for name in SCENARIOS
                              if _LAW.value == "paper" or name == "several tokens"]
  print("\n".join(table(_LAW.value, _GRIDS.value, _CELLS.value, names)))


if __name__ == "__main__":
  _GRIDS = flags.DEFINE_integer("grids", 2000, "Synthetic grids.", lower_bound=1)
  _CELLS = flags.DEFINE_integer("cells", 24, "Architectures in each grid.", lower_bound=8)
  _LAW = flags.DEFINE_enum("law", "paper", ["paper", "paper-tokens"], "The planted form.")
  _SCENARIO = flags.DEFINE_multi_enum("scenario", None, list(SCENARIOS), "Which; default all.")
  app.run(main)
