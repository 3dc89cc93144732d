"""Grids: names, selection, overrides, and experiment files that are wrong."""

import dataclasses
import re

import pytest
from hypothesis import given, strategies

from moe_jax import grid as grid_lib
from moe_jax.config import Architecture, RunConfig
from moe_jax.errors import FieldError
from moe_jax.fields import override
from moe_jax.grid import Grid, cell_name, get_config, load_grid, select
from moe_jax.sections import NAME
from tests.experiment_files import BASE, write, write_tiny

RECIPE = RunConfig(arch=Architecture(
    n_layers=4, d_model=128, d_expert=64, n_exp=8, n_topk=2, n_heads=4))


@pytest.mark.parametrize("changes, name", [
    ({}, "l4-d128-f64-e8-k2"),
    ({"arch.n_layers": 2, "arch.d_expert": 32}, "l2-d128-f32-e8-k2"),
    ({"train.learning_rate": 3e-3}, "l4-d128-f64-e8-k2-lr3e-3"),
    ({"train.learning_rate": 1.25e-4}, "l4-d128-f64-e8-k2-lr1.25e-4"),
    ({"train.learning_rate": 0.02}, "l4-d128-f64-e8-k2-lr0.02"),
    ({"seed_init": 1}, "l4-d128-f64-e8-k2-s1"),
    ({"seed_data": 2}, "l4-d128-f64-e8-k2-sd2"),
    ({"moe.norm_topk_prob": False}, "l4-d128-f64-e8-k2-norm0"),
    ({"moe.capacity_factor": 2.0}, "l4-d128-f64-e8-k2-cf2"),
    ({"moe.z_coef": 0.0}, "l4-d128-f64-e8-k2-z0"),
    ({"moe.dispatch": "reference"}, "l4-d128-f64-e8-k2-dispatchreference"),
    ({"data.tokenizer": "bpe-260"}, "l4-d128-f64-e8-k2-tokenizerbpe-260"),
    ({"train.weight_decay": 0.0, "seed_init": 1}, "l4-d128-f64-e8-k2-wd0-s1"),
    ({"execution.remat": "full", "execution.mesh.fsdp": 2}, "l4-d128-f64-e8-k2"),
])
def test_a_name_tells_the_shape_and_what_differs_from_the_recipe(changes, name):
  assert cell_name(override(RECIPE, changes), RECIPE) == name


def test_tokens_stand_for_steps_of_the_batch_that_is_asked_for():
  grid = Grid("g", RECIPE, (RECIPE, override(RECIPE, {"train.batch_size": 8})))
  in_tokens = grid.override({"train.tokens": 1e6, "data.seq_len": 100})
  assert [config.train.steps for config in in_tokens.cells] == [
      round(1e6 / (RECIPE.train.batch_size * 100)), 1250]
  (one,) = Grid("g", RECIPE, (RECIPE,)).override({"train.tokens": 1e6, "train.batch_size": 4}).cells
  assert one.train.steps == round(1e6 / (4 * RECIPE.data.seq_len))
  with pytest.raises(FieldError, match=r"train\.tokens=5\.0: must be at least the \d+ of one"):
    grid.override({"train.tokens": 5.0})
  with pytest.raises(FieldError, match=r"train\.tokens.*conflicts with train\.steps"):
    grid.override({"train.tokens": 1e6, "train.steps": 7})


@given(rate=strategies.floats(1e-12, 1e3), seed=strategies.integers(0, 2**31 - 1),
       corpus=strategies.from_regex(NAME, fullmatch=True))
def test_any_name_suits_a_path_and_a_job(rate, seed, corpus):
  config = override(RECIPE, {"train.learning_rate": rate, "seed_init": seed,
                             "data.corpus": corpus})
  name = cell_name(config, RECIPE)
  assert re.fullmatch(r"[a-z0-9][a-z0-9.-]*", name)
  assert ".." not in name
  tag = re.search(r"-lr([0-9.]+(e-?[0-9]+)?)(-|$)", name)
  shown = float(tag[1]) if tag else RECIPE.train.learning_rate
  assert shown == pytest.approx(rate, rel=1e-11)


def test_two_cells_of_one_name_are_refused_and_the_fields_named():
  with pytest.raises(FieldError, match="two cells have this name: they are the same run"):
    Grid("g", RECIPE, (RECIPE, override(RECIPE, {"execution.remat": "full"})))
  close = override(RECIPE, {"train.learning_rate": 1e-3 * (1 + 1e-14)})
  with pytest.raises(FieldError, match=r"this name: train\.learning_rate is 0\.001.* here"):
    Grid("g", override(RECIPE, {"train.learning_rate": 0.5}), (RECIPE, close))


@pytest.mark.parametrize("name", ["", "Big", "a b", "a/b", "-x", ".."])
def test_a_grid_name_that_does_not_suit_a_path_is_refused(name):
  with pytest.raises(FieldError, match=r"grid\.name"):
    Grid(name, RECIPE, (RECIPE,))


def test_an_empty_grid_is_refused():
  with pytest.raises(FieldError, match=r"grid\.cells='RunConfig': must be a tuple of config"):
    Grid("g", RECIPE, RECIPE)
  with pytest.raises(FieldError, match=r"grid\.cells=\(\): must hold at least one cell"):
    Grid("g", RECIPE, ())


# Selection


def test_a_file_selects_all_its_cells_in_order(tmp_path):
  cells = select(write_tiny(tmp_path, seeds=3))
  assert [cell.name for cell in cells] == [BASE, f"{BASE}-s1", f"{BASE}-s2"]
  assert {cell.experiment for cell in cells} == {"tiny"}
  assert [cell.config.seed_init for cell in cells] == [0, 1, 2]


def test_a_cell_is_selected_by_name(tmp_path):
  file = write_tiny(tmp_path)
  (cell,) = select(f"{file}:{BASE}-s1")
  assert cell.config.seed_init == 1
  assert get_config(f"{file}:{BASE}-s1") == cell.config


def test_several_cells_are_selected_in_the_order_of_their_names(tmp_path):
  spec = write_tiny(tmp_path, seeds=3)
  assert [cell.name for cell in select(f"{spec}:{BASE}-s2,{BASE}")] == [f"{BASE}-s2", BASE]
  with pytest.raises(FieldError, match="no such cell; did you mean"):
    select(f"{spec}:{BASE},{BASE}-s7")


def test_an_override_for_the_whole_grid_shows_in_every_name(tmp_path):
  file = write_tiny(tmp_path)
  cells = select(file, {"train.learning_rate": 0.01})
  assert [cell.name for cell in cells] == [f"{BASE}-lr0.01", f"{BASE}-lr0.01-s1"]
  # the selector finds the cell again, with the same overrides
  for cell in cells:
    assert select(cell.selector, {"train.learning_rate": 0.01}) == (cell,)


def test_an_override_for_one_cell_may_make_it_what_another_is(tmp_path):
  (cell,) = select(f"{write_tiny(tmp_path)}:{BASE}", {"seed_init": 1})
  assert cell.name == f"{BASE}-s1"


def test_an_override_that_makes_two_cells_one_is_refused(tmp_path):
  file = write_tiny(tmp_path)
  with pytest.raises(FieldError, match="^config=.*the overrides give .*they are the same"):
    select(file, {"seed_init": 1})


def test_a_refused_override_is_named_as_its_flag(tmp_path):
  with pytest.raises(FieldError, match=r"^config\.arch\.n_topk=5: must be at most n_exp"):
    select(write_tiny(tmp_path), {"arch.n_topk": 5})


def test_a_near_miss_of_a_cell_is_answered_with_the_nearest(tmp_path):
  with pytest.raises(FieldError, match=rf"no such cell; did you mean .*'{BASE}-s1'"):
    select(f"{write_tiny(tmp_path)}:{BASE}-s9")


def test_get_config_wants_one_cell(tmp_path):
  with pytest.raises(FieldError, match="selects 2 cells; name one: " + BASE):
    get_config(write_tiny(tmp_path))


# Files


def test_a_missing_file_is_answered_with_the_nearest(tmp_path):
  write_tiny(tmp_path)
  with pytest.raises(FieldError, match=r"no such experiment file; did you mean '.*tiny\.py'"):
    load_grid(str(tmp_path / "tinny.py"))
  with pytest.raises(FieldError, match="no such experiment file"):
    load_grid(str(tmp_path / "nowhere" / "x.py"))


@pytest.mark.parametrize("source, message", [
    ("def get_grid():\n  return 1 / 0\n", r"at tiny\.py:2: ZeroDivisionError: division by"),
    ("import nonsense_module\n", r"at tiny\.py:1: ModuleNotFoundError: .*nonsense_module"),
    ("x = 1\ndef get_grid(:\n", r"SyntaxError: .*line 2"),
    ("def get_grid():\nreturn 1\n", r"IndentationError: .*line 2"),
    ("def get_grid():\n  raise ValueError('a\\nb')\n", r"at tiny\.py:2: ValueError: a b"),
    ("def grid():\n  pass\n", r"get_grid=None: is missing"),
    ("def get_grid():\n  return []\n", r"must return a moe_jax\.grid\.Grid, not list"),
    ("from moe_jax.config import Architecture\n"
     "def get_grid():\n  return Architecture(1, 8, 8, 2, 3, 1)\n",
     r"the file gives n_topk=3: must be at most n_exp, which is 2"),
])
@pytest.mark.parametrize("relative", [False, True])
def test_a_wrong_file_is_answered_in_one_line(tmp_path, monkeypatch, source, message,
                                              relative):
  file = write(tmp_path, source)
  if relative:
    monkeypatch.chdir(tmp_path)
    file = "tiny.py"
  with pytest.raises(FieldError, match=message) as caught:
    load_grid(file)
  assert "\n" not in str(caught.value)
  assert caught.value.field == "config"


def test_a_file_may_define_dataclasses_of_its_own(tmp_path):
  # their type hints resolve only where the module is registered
  source = write_tiny(tmp_path)
  file = write(tmp_path, "from __future__ import annotations\n" + '''
import dataclasses
import typing

from moe_jax.grid import Grid, load_grid

@dataclasses.dataclass
class Sweep:
  seeds: Seeds

@dataclasses.dataclass
class Seeds:
  n: int

def get_grid():
  assert typing.get_type_hints(Sweep)["seeds"] is Seeds
  return load_grid(SOURCE)
'''.replace("SOURCE", repr(source)), "own.py")
  assert isinstance(load_grid(file), Grid)


def test_cells_may_differ_in_execution_alone_within_one_name_space(tmp_path):
  grid = load_grid(write_tiny(tmp_path))
  again = grid.override({"execution.log_every": 3})
  assert again.names == grid.names
  assert [config.execution.log_every for config in again.cells] == [3, 3]
  assert dataclasses.replace(again, cells=grid.cells) == grid
  assert isinstance(again, grid_lib.Grid)


@pytest.mark.parametrize("n_total", [0, -5, "many", float("nan")])
def test_a_grids_size_must_be_a_size(n_total):
  with pytest.raises(FieldError, match="grid.n_total"):
    Grid("sized", RECIPE, (RECIPE,), n_total)


def test_a_file_that_exits_is_no_success(tmp_path):
  with pytest.raises(FieldError, match="raises at quits.py:2: SystemExit: 0"):
    load_grid(write(tmp_path, "import sys\nsys.exit(0)\n", "quits.py"))
