import pytest

from benchmarks import population
from tests.small import small_config


@pytest.mark.slow
def test_sizes_are_measured_against_one_member():
  rows = population.measure(small_config(), sizes=[1, 2], steps=1, passes=1)
  assert [row["population"] for row in rows] == [1, 2]
  assert rows[0]["over_one_after_another"] == 1
  for row in rows:
    assert row["tokens_per_second"] > 0 and row["share_of_matmul_peak"] > 0
