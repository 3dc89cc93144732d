"""Cells dealt out to slices: all of them, once, families together, work even."""

from launch.jobs import jobs_of
from launch.shares import deal, families
from moe_jax.grid import select
from tests.experiment_files import write, write_tiny
from tests.launch.branch_test import SOURCE


def _jobs(folder, seeds=5, out="/runs"):
  return jobs_of(select(write_tiny(folder, seeds=seeds)), out, [])


def test_every_cell_is_dealt_once_and_work_is_even(tmp_path):
  jobs = _jobs(tmp_path, seeds=7)
  shares = deal(jobs, 3)
  assert sorted(len(share.jobs) for share in shares) == [2, 2, 3]
  assert sorted(job.name for share in shares for job in share.jobs) == sorted(
      job.name for job in jobs)
  assert len({share.name for share in shares}) == 3


def test_there_are_never_more_shares_than_families(tmp_path):
  jobs = _jobs(tmp_path, seeds=5)
  for slices in range(1, 9):
    shares = deal(jobs, slices)
    assert len(shares) == min(slices, 5)
    assert all(share.jobs for share in shares)


def test_a_trunk_and_its_branches_stay_together_and_in_order(tmp_path):
  jobs = jobs_of(select(write(tmp_path, SOURCE, "budgets.py")), "/runs", [])
  (family,) = families(jobs)
  assert len(family) == 3
  (share,) = deal(jobs, 4)
  assert share.jobs[0].cell.config.train.branch_from is None


def test_names_follow_from_the_cells_and_where_they_are_kept(tmp_path):
  def names(**changed):
    return [share.name for share in deal(_jobs(tmp_path, **changed), 2)]

  assert names() == names()
  assert not set(names()) & set(names(out="/elsewhere"))
  assert set(names()) != set(names(seeds=6))
  assert all(name.startswith("tiny-") for name in names())
