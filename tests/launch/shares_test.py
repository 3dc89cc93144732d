"""Cells dealt out to slices: all of them, once, families and populations together, work even."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.backends import gcloud, gke, slurm
from launch.code import Code
from launch.jobs import jobs_of, require_sources
from launch.shares import deal, families
from launch.work import from_text, work_of
from moe_jax import population
from moe_jax.config import (
    Architecture,
    ExecutionConfig,
    RunConfig,
    TrainConfig,
)
from moe_jax.errors import FieldError
from moe_jax.fields import override
from moe_jax.files import write_json
from moe_jax.grid import Cell, Grid, select, trunk_and_branches
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


_RECIPE = RunConfig(
    arch=Architecture(n_layers=1, d_model=16, d_expert=8, n_exp=4, n_topk=2, n_heads=2),
    train=TrainConfig(steps=40, warmup_steps=2), execution=ExecutionConfig(population=3))
_ALONE = st.builds(
    lambda **values: [override(_RECIPE, {path.replace("__", "."): value
                                         for path, value in values.items()})],
    seed_init=st.integers(0, 9), train__steps=st.sampled_from([40, 60]),
    train__learning_rate=st.sampled_from([1e-3, 2e-3]), arch__d_expert=st.sampled_from([8, 12]))
_BRANCHED = st.integers(10, 19).map(lambda seed: list(trunk_and_branches(
    override(_RECIPE, {"seed_init": seed}), _RECIPE, (0.5, 1.0))))


@settings(max_examples=40, deadline=None)
@given(found=st.lists(_ALONE | _BRANCHED, min_size=1, max_size=9), slices=st.integers(1, 6),
       limit=st.integers(1, 4))
def test_what_trains_together_or_branches_stays_on_one_slice(found, slices, limit):
  by_name = dict.fromkeys(override(config, {"execution.population": limit})
                          for configs in found for config in configs)
  grid = Grid("g", _RECIPE, tuple(by_name))
  cells = [Cell("g", f"e.py:{name}", name, config)
           for name, config in zip(grid.names, grid.cells, strict=True)]
  jobs = jobs_of(cells, "/runs", [])
  shares = deal(jobs, slices)
  dealt = [job.name for share in shares for job in share.jobs]
  assert sorted(dealt) == sorted(cell.name for cell in cells)
  home = {job.name: share.name for share in shares for job in share.jobs}
  groups = [tuple(cell.name for cell in group) for group in population.deal(cells)]
  assert all(len({home[name] for name in group}) == 1 for group in groups)
  for cell in cells:
    assert home[cell.name] == home.get(cell.config.train.branch_run, home[cell.name])
  # Each slice trains the very groups, a trunk's before those of its branches.
  trained = [group for share in shares
             for group in work_of(share, Code("c", "a" * 64, "e.py", b""), "/runs", "test").groups]
  assert sorted(trained) == sorted(groups)
  place = {name: number for number, group in enumerate(trained) for name in group}
  for cell in cells:
    trunk = cell.config.train.branch_run
    assert trunk is None or place[trunk] < place[cell.name]
  assert deal(jobs, slices) == shares


@pytest.mark.parametrize("backend, options, devices", [
    (gcloud, gcloud.Options("p", ("us-east5-b",), "v6e-1"), 1),
    (gcloud, gcloud.Options("p", ("us-east5-b",), "v5litepod-1"), 1),
    (gcloud, gcloud.Options("p", ("us-east5-b",), "v6e-1", slices_per_run=2), 2),
    (gke, gke.Options("v6e-4", "i:1"), 4), (gke, gke.Options("tpu7x-8", "i:1"), 8),
    (slurm, slurm.Options(), 1), (slurm, slurm.Options(gpus_per_node=0, tasks_per_node=3), 3),
    (slurm, slurm.Options(nodes=2), 2), (slurm, slurm.Options(gpus_per_node=8), 8)])
def test_a_plan_says_what_trains_together_and_a_run_how_many_devices_it_has(
    tmp_path, backend, options, devices):
  assert options.run_devices == devices
  jobs = jobs_of(select(write_tiny(tmp_path, seeds=5), {"execution.population": 2}), "/runs", [])
  planned = backend.plan(jobs, options, Code("c", "a" * 64, "e.py", b""), "/runs")
  groups = [from_text(file.text, file.path).groups for share in planned.slices
            for file in share.files if file.path.endswith("work.json")]
  names = [job.name for job in jobs]
  pairs = [(*names[0:2],), (*names[2:4],), (names[4],)]
  # SLURM's array has a task a family; the others' one slice trains all.
  assert groups == ([(pair,) for pair in pairs] if backend is slurm else [tuple(pairs)])


def test_a_run_and_what_begins_with_its_parameters_stay_together(tmp_path):
  first, *others = _jobs(tmp_path, seeds=3)
  after = dataclasses.replace(others[0], cell=dataclasses.replace(
      others[0].cell, config=override(others[0].cell.config, {
          "train.init_from": f"{first.cell.experiment}/{first.name}"})))
  found = [{job.name for job in family} for family in families([first, after, others[1]])]
  assert found == [{first.name, after.name}, {others[1].name}]


def test_what_a_run_begins_from_must_be_there_before_machines_are(tmp_path):
  first, second = _jobs(tmp_path, seeds=2, out=str(tmp_path / "runs"))

  def beginning(source):
    return dataclasses.replace(second, cell=dataclasses.replace(second.cell, config=override(
        second.cell.config, {"train.init_from": source})))

  own = f"{first.cell.experiment}/{first.name}"
  require_sources([first, beginning(own)])
  for source in ("nowhere/none", own):
    with pytest.raises(FieldError, match="is the source of .*, but that checkpoint does not exist"):
      require_sources([beginning(source)])
  (first.run_dir.checkpoints / "20").mkdir(parents=True)
  with pytest.raises(FieldError, match="that run has not finished"):
    require_sources([beginning(own)])
  write_json(first.run_dir.checksums(20), {})
  first.run_dir.write_status({"state": "finished", "step": 20})
  require_sources([beginning(own)])
  require_sources([beginning(f"{own}@20")])
  with pytest.raises(FieldError, match="that checkpoint does not exist"):
    require_sources([beginning(f"{own}@10")])
