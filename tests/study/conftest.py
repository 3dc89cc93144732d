"""What several tests of this room start from."""

import pytest

from tests.study import planted


@pytest.fixture(scope="session")
def results(tmp_path_factory):
  """results.csv of a planted grid, a config.json a run beside it. Tests only read it."""
  return planted.write_runs(tmp_path_factory.mktemp("runs"), planted.grid())
