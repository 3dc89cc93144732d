"""The matrix of tests/train/matrix.py for the sigmoid router with a selection bias."""

import pytest

from tests.train import matrix

FAST = {("dropless", "expert8", "bfloat16")}
MESHES = ("expert8", "fsdp2_expert4", "data2_fsdp2_expert2", "fsdp8")  # on the last it packs


@pytest.mark.parametrize(("dispatch", "mesh_name", "dtype"), matrix.cells(FAST, MESHES))
def test_one_step_equals_the_reference_on_one_device(dispatch, mesh_name, dtype):
  matrix.check("sigmoid", dispatch, mesh_name, dtype)
