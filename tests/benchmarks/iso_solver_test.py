from benchmarks import iso_solver


def test_measures_all_that_can_be_held_and_compares():
  problems = iso_solver.draw_problems(40)
  rows = [iso_solver.measure(problem, n_alone=5) for problem in problems.values()]
  assert len(rows) == 4
  for row in rows:
    assert (row["cells"], row["cells_alone"]) == (40, 5)
    assert 0 < row["solved"] <= 1
    assert row["median_abs_residual_ppm"] <= 5000
    assert row["seconds_at_once"] > 0
