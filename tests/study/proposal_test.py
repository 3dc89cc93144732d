"""What is proposed: that it helps, that it can be launched, that it is what was asked."""

import dataclasses

import pytest

from moe_jax.config import identity
from moe_jax.errors import FieldError
from moe_jax.grid import cell_name, load_grid
from moe_jax.laws.fit import fit
from moe_jax.laws.reduce import to_cells
from moe_jax.laws.table import read_results
from moe_jax.study import targets
from moe_jax.study.proposal import Ask, propose
from tests.study import planted


def cells_of(path):
  return to_cells(read_results(path), path)


def test_it_helps_by_as_much_as_is_said(results, tmp_path):
  """The cells of the proposal, run and added to the table, give the interval expected."""
  ask = Ask(add=4, seed_sd=0.002, architecture_sd=0.001)
  found = propose(results, ask)
  assert len(found.configs) == 4
  assert found.after["b_minus_c"] < 0.8 * found.before["b_minus_c"]
  grown = dataclasses.replace(planted.grid(), cells=(*planted.grid().cells, *found.configs))
  path = planted.write_runs(tmp_path, grown)
  again = propose(path, dataclasses.replace(ask, add=1))
  for name, half_width in found.after.items():
    assert again.before[name] == pytest.approx(half_width, rel=1e-6), name
  assert found.choice.half_width[-1] == pytest.approx(found.after["b_minus_c"])


def test_the_file_is_the_proposal_and_belongs_to_the_runs(results, tmp_path):
  found = propose(results, Ask(add=5, architecture_sd=0.0))
  path = tmp_path / "next.py"
  found.write(str(path))
  grid = load_grid(str(path))
  assert grid == found.grid and grid.cells == found.configs
  assert grid.name == "planted"
  assert all(len(line) <= 100 for line in path.read_text().splitlines())
  done = planted.grid()
  assert not set(grid.names) & set(done.names)
  # With no noise of architectures some are repeats; else the recipe is that of the runs.
  for name, config in zip(grid.names, grid.cells, strict=True):
    assert name == cell_name(config, done.cells[0])
    ours, theirs = identity(config), identity(planted.RECIPE)
    assert {p for p in ours if ours[p] != theirs[p]} <= {
        "arch.n_exp", "arch.n_topk", "arch.d_model", "arch.d_expert", "seed_init"}
  before = path.read_text()
  with pytest.raises(FieldError, match="exists, and is not overwritten"):
    found.write(str(path))
  assert path.read_text() == before


def test_repeats_take_new_seeds(tmp_path):
  """Where seeds are all the noise, and nothing else may be tried."""
  done = planted.grid(seeds=2)
  path = planted.write_runs(tmp_path, done)
  found = propose(path, Ask(add=6, architecture_sd=0.0,
                            region={"n_exp": (8, 16, 32), "sparsity": (4.0,)}))
  repeats = [c for c in found.configs if c.arch in {run.arch for run in done.cells}]
  assert repeats and all(config.seed_init >= 2 for config in repeats)
  assert len(set(found.grid.names)) == 6 and not set(found.grid.names) & set(done.names)
  assert "from repeated runs" in "\n".join(found.lines())


def test_a_budget_of_flops_is_kept(results):
  from moe_jax.study.candidates import flops
  found = propose(results, Ask(add=10, flops=6e12))
  assert 0 < sum(flops(config) for config in found.configs) <= 6e12
  with pytest.raises(FieldError, match="flops=1.0: is too small for any run"):
    propose(results, Ask(flops=1.0))


def test_a_tie_is_broken_first(tmp_path):
  """One size alone does not identify a; a second one does, and without it a is refused."""
  path = planted.write_runs(tmp_path, planted.grid(sizes=(700_000,)))
  with pytest.raises(FieldError, match="target='a': no candidate identifies it: ln n_total"):
    propose(path, Ask(target="a"))
  found = propose(path, Ask(target="a", add=2, region={"n_total": (700_000, 2_000_000)}))
  assert "a" not in found.before and found.after["a"] < 0.05
  assert found.so_far == "not identified"
  assert "(without a so far, with it after)" in "\n".join(found.lines())
  assert found.configs[0].arch.n_layers == 2


def test_the_choice_of_an_architecture(results):
  ask = Ask(target=targets.CHOICE, choice=(1_500_000, 900_000), architecture_sd=0.02,
            region={"n_total": (700_000, 2_000_000)})
  found = propose(results, ask)
  text = "\n".join(found.lines())
  assert "others are not significantly worse" in text and "differences in ln L" in text
  assert found.choice.half_width[-1] < found.choice.half_width[0]
  with pytest.raises(FieldError, match="is not in doubt"):
    propose(results, dataclasses.replace(ask, architecture_sd=0.0, seed_sd=1e-5))
  with pytest.raises(FieldError, match="choice_n_active=1000: leaves 0 architectures"):
    propose(results, dataclasses.replace(ask, choice=(1_500_000, 1000)))
  with pytest.raises(FieldError, match="choice_n_total=None: is needed"):
    propose(results, Ask(target=targets.CHOICE))


@pytest.mark.parametrize("target", [targets.ALL, targets.MEAN, "c"])
def test_every_target(results, target):
  found = propose(results, Ask(target=target, add=2))
  assert found.choice.half_width[2] < found.choice.half_width[1] < found.choice.half_width[0]


def test_the_noise_is_that_of_the_fit(results):
  """Before and after are told with it; so far it gives the fit's own interval."""
  from moe_jax.laws.intervals import profile
  found = propose(results, Ask(add=1, seed_sd=1e-6))
  interval = profile(fit(cells_of(results), "paper"))["b_minus_c"]
  assert found.before["b_minus_c"] == pytest.approx((interval.high - interval.low) / 2, rel=1e-3)


def test_configurations_are_found_or_asked_for(tmp_path):
  done = planted.grid()
  path = planted.write_runs(tmp_path, done, configs=False)
  with pytest.raises(FieldError, match="config=None: is needed: .* has no .*config.json"):
    propose(path, Ask())
  file = tmp_path / "planted.py"
  file.write_text("from tests.study import planted\nget_grid = planted.grid\n")
  found = propose(path, Ask(add=1), str(file))
  assert found.history.recipe == planted.RECIPE
  file.write_text("from tests.study import planted\n"
                  "def get_grid():\n  return planted.grid(sizes=(700_000,))\n")
  with pytest.raises(FieldError, match="is needed"):
    propose(path, Ask(), str(file))


@pytest.mark.parametrize("ask,match", [
    (Ask(target="b"), "target='b'"), (Ask(add=0), "add=0"), (Ask(law="papr"), "law='papr'"),
    (Ask(region={"n_exp": (0,)}), "n_exp=0"), (Ask(region={"aspect": -1.0}), "aspect=-1"),
    (Ask(region={"aspect": 8.0, "n_layers": 2}), "cannot both be held"),
    (Ask(seed_sd=-0.1), "seed_sd=-0.1")])
def test_bad_input(results, ask, match):
  with pytest.raises(FieldError, match=match):
    propose(results, ask)
