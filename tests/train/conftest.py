import pytest
from etils import epath

from moe_jax.run_dir import RunDir


@pytest.fixture
def run_dir(tmp_path):
  return RunDir(epath.Path(tmp_path / "run"))
