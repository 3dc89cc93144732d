"""The table for people: aligned, and never cut."""

from launch.state import CellState
from launch.table import counts, progress, table

_ROWS = [
    CellState("a", "l2", "hash", 12_345_678, 1_234_567, "running", 5, 100, 2.34567, 15_234.0,
              61.0),
    CellState("a", "l10-" + "x" * 150, state="failed", error="[bold]" + "e" * 300),
]


def test_columns_are_aligned_and_nothing_is_cut():
  head, first, second = table(_ROWS)
  assert head.split() == ["cell", "N_total", "N_active", "state", "step", "loss", "tokens/s",
                          "heard", "error"]
  assert first.split() == ["l2", "12.3M", "1.23M", "running", "5/100", "2.3457", "15.2k", "1",
                           "min"]
  assert second.split() == [_ROWS[1].cell, "failed", _ROWS[1].error]
  assert head.index("state") == first.index("running") == second.index("failed")
  assert head.index("error") == second.index("[bold]")


def test_several_experiments_are_told_apart():
  rows = [_ROWS[0], CellState("b", "l2")]
  assert [line.split()[0] for line in table(rows)[1:]] == ["a/l2", "b/l2"]


def test_counts_and_progress():
  assert counts(_ROWS) == "2 cells: 1 running, 1 failed"
  assert progress(_ROWS[0]) == "running, step 5/100, loss 2.3457, 15.2k tokens/s"
  assert progress(CellState("a", "b")) == "pending"
