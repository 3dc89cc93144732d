"""The matrix of tests/train/matrix.py for the softmax router."""

import pytest

from tests.train import matrix

FAST = {("dropless", "data2_fsdp2_expert2", "float32"),
        ("capacity", "fsdp2_expert4", "float32")}


@pytest.mark.parametrize(("dispatch", "mesh_name", "dtype"), matrix.cells(FAST))
def test_one_step_equals_the_reference_on_one_device(dispatch, mesh_name, dtype):
  matrix.check("softmax", dispatch, mesh_name, dtype)
