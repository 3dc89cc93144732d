"""The choice is within the budget and best by the law; the others use the same budget up."""

import math
import re

import numpy as np
import pytest

from moe_jax.arch import count
from moe_jax.config import identity_hash
from moe_jax.errors import FieldError
from moe_jax.grid import load_grid
from moe_jax.laws.fit import fit
from moe_jax.laws.reduce import to_cells
from moe_jax.laws.table import read_results
from moe_jax.study import contest
from moe_jax.study.rates import Rates
from moe_jax.study.so_far import so_far
from tests.experiment_files import run_module
from tests.study import planted

BUDGET = (0.0042, 1.3e6)


def held(results, **asked):
  rows = read_results(results)
  return contest.contest(fit(to_cells(rows), "paper"), so_far(rows, results), *BUDGET, **asked)


def test_all_are_of_one_budget_and_the_choice_is_the_best(results):
  found = held(results)
  assert len(found.configs) == 11 and len({config.arch for config in found.configs}) == 11
  for config in found.configs:
    arch = config.arch
    assert arch.n_heads == planted.RECIPE.arch.n_heads and arch.head_dim is None
    assert 0.75 * BUDGET[1] * 0.999 < count.n_active(arch) <= BUDGET[1] * 1.001
    weights = 2 * count.n_total_with_embedding(arch) / 1e9
    assert 0.8 * BUDGET[0] < weights <= BUDGET[0]
  assert found.predicted[0] <= min(found.predicted) * 1.0002


def test_the_seed_decides_the_others_and_the_rates_theirs(results):
  one, again, other = held(results), held(results), held(results, seed=1)
  assert one.configs == again.configs != other.configs
  assert one.configs[0] == other.configs[0]
  law = Rates({"intercept": math.log(1e-3), "n_total": 0.0, "sparsity": 0.0, "n_exp": 0.1})
  for config in held(results, rates=law).configs:
    assert config.train.learning_rate == pytest.approx(1e-3 * config.arch.n_exp**0.1, rel=0.005)


def test_too_few_of_the_budget_are_refused(results):
  with pytest.raises(FieldError, match="other architectures use up this budget"):
    held(results, others=10_000)


def test_written_launched_and_ranked(results, tmp_path):
  file = tmp_path / "trial.py"
  command = ("-m", "moe_jax.study.trial", f"--results={results}", "--memory_gb=0.0042")
  done = run_module(*command, "--active_params=1.3M", "--others=3", f"--write={file}")
  assert done.returncode == 0, done.stderr
  grid = load_grid(str(file))
  assert grid.name == "planted-trial" and len(grid.cells) == 4
  rows = [{"identity": identity_hash(config), "cell": name, "loss": loss}
          for config, name, loss in zip(grid.cells, grid.names, (2.0, 1.99, 2.02, 2.03),
                                        strict=True)]
  lines = contest.rank(grid, rows, 0.002)
  assert lines[-2] == "the choice ranks 2 of 4"
  assert ("is +0.50 % relative to the best of the others and -1.00 % relative to their median"
          in lines[-1])
  draws = np.random.default_rng(0).standard_normal((200_000, 4))
  by_chance = np.quantile(draws[:, 0] - draws[:, 1:].min(axis=1), 0.95)
  told = float(re.search(r"would be up to ([\d.]+) % behind", lines[-1])[1])
  assert told == pytest.approx(100 * 0.002 * by_chance, abs=0.01)
  with pytest.raises(FieldError, match="is the choice but has no loss"):
    contest.rank(grid, rows[1:], 0.002)
  for arguments, line in (
      ([], "error: --active_params=None: is needed"),
      (["--active_params=2k"], "error: --active_params=2000.0: too small"),
      (["--active_params=1.3M", f"--write={file}"], "exists, and is not overwritten")):
    refused = run_module(*command, *arguments)
    assert refused.returncode == 2 and line in refused.stderr, refused.stderr
    assert refused.stderr.count("\n") == 1
