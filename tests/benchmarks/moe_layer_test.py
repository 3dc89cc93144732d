import numpy as np
import pytest

from benchmarks import moe_layer


@pytest.mark.slow
@pytest.mark.parametrize("dispatch", ["capacity", "dropless"])
def test_every_part_is_measured_and_the_parts_make_the_layer(dispatch, monkeypatch):
  for name, value in (("SEQ_LEN", 16), ("D_MODEL", 8), ("ACTIVE_WIDTH", 8), ("SPARSITY", 2)):
    monkeypatch.setattr(moe_layer, name, value)
  layer = moe_layer.Layer(2, 2, dispatch, "float32")
  (found,) = moe_layer.measure([layer], passes=1)
  assert tuple(found) == moe_layer.PARTS
  assert all(0 < ms < np.inf for times in found.values() for ms in times.values())
  parts = moe_layer.parts_of(layer)
  rows = parts["experts"][0](*parts["experts"][1]).reshape(-1, 8)
  combine, (_, slots) = parts["combine"]
  whole = parts["layer"][0](*parts["layer"][1]).reshape(-1, 8)
  np.testing.assert_allclose(combine(rows, slots), whole, rtol=1e-5, atol=1e-6)


def test_share_and_exponent():
  times = {"route": 2.0, "dispatch": 1.0, "experts": 6.0, "combine": 1.0, "layer": 99.0}
  found = {part: {"forward": ms} for part, ms in times.items()}
  assert moe_layer.share_moved(found, "forward") == 0.2
  assert moe_layer.exponent([1, 2, 4], [3.0, 6.0, 12.0]) == pytest.approx(1)
