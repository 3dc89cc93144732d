import pytest

from benchmarks import population
from moe_jax.config import resolve_mesh
from tests.experiment_files import run_module
from tests.small import small_config


@pytest.mark.parametrize("name", ["quickstart", "bytes-5m", "reference"])
def test_every_model_is_of_one_device(name):
  assert resolve_mesh(population.model(name), 1, 1) == (1, 1, 1)


@pytest.mark.parametrize("change, said", [("moe.dispatch=drop", "moe.dispatch='drop': must be"),
                                          ("arch.n_topk=999", "arch.n_topk=999: must")])
def test_a_change_that_is_none_is_refused_before_anything_is_compiled(change, said):
  done = run_module("-m", "benchmarks.population", f"--config.{change}")
  assert done.returncode == 2 and done.stderr.startswith(f"error: --config.{said}")
  assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_sizes_are_measured_against_one_member():
  rows = population.measure(small_config(), sizes=[1, 2], steps=1, passes=1)
  assert [row["population"] for row in rows] == [1, 2]
  assert rows[0]["over_one_after_another"] == 1
  for row in rows:
    assert row["tokens_per_second"] > 0 and row["share_of_matmul_peak"] > 0
