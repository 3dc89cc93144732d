"""What several tests of this room start from."""

import pytest

from moe_jax.laws.fit import fit
from moe_jax.laws.reduce import to_cells
from tests.laws.results_file import rows_of


@pytest.fixture(scope="session")
def fitted():
  """A log-log law on 40 cells."""
  return fit(to_cells(rows_of(n_cells=40)), "paper")
