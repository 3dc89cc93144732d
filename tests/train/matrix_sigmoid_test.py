"""The matrix of tests/train/matrix.py for the sigmoid router with a selection bias."""

import pytest

from tests.train import matrix

FAST = {("dropless", "dense", "expert8", "bfloat16")}


@pytest.mark.parametrize(("dispatch", "arch", "mesh_name", "dtype"), matrix.cells(FAST))
def test_one_step_equals_the_reference_on_one_device(dispatch, arch, mesh_name, dtype):
  matrix.check("sigmoid", dispatch, arch, mesh_name, dtype)
