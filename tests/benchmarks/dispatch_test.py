from benchmarks import dispatch


def test_every_dispatch_is_measured_and_only_a_capacity_drops():
  rows = dispatch.measure((8, 2, 16), sequences=1, dtype="float32", repeats=1)
  assert list(rows) == ["capacity 1.25", "capacity E/K", "dropless"]
  assert all(row["gradients_ms"] > 0 and row["forward_ms"] > 0 for row in rows.values())
  assert rows["dropless"]["dropped"] == rows["capacity E/K"]["dropped"] == 0
