"""What is worth compiling, and what is recommended of it."""

import dataclasses

import pytest

from moe_jax import cli
from moe_jax.config import resolve_mesh
from moe_jax.errors import FieldError
from moe_jax.fields import override
from moe_jax.grid import select
from moe_jax.plan import cells, search, topology
from moe_jax.plan import coarse as coarse_lib

(REFERENCE,) = select("experiments/reference.py")


@pytest.mark.parametrize("name, n_slices", [("v5p-64", 1), ("v6e-16", 1), ("v5litepod-8", 2)])
def test_every_layout_is_one_that_the_cell_allows(name, n_slices):
  where = topology.parse(name, n_slices)
  found = search.layouts(REFERENCE.config, where)
  assert len({layout.label for layout in found}) == len(found) > 20
  for layout in found:
    mesh = layout.config.execution.mesh
    assert resolve_mesh(layout.config, where.devices, n_slices) == (
        mesh.data, mesh.fsdp, mesh.expert)
    assert mesh.data % n_slices == 0
    assert dataclasses.replace(layout.config, execution=REFERENCE.config.execution
                               ) == REFERENCE.config  # nothing of the identity is touched


def coarse(layout_flags, name="v5p-64"):
  where = topology.parse(name)
  (found,) = [layout for layout in search.layouts(REFERENCE.config, where)
              if layout.label == layout_flags]
  return found


def test_the_coarse_model_knows_what_saves_memory_and_what_it_costs():
  for cheap, dear in (("data1-fsdp32-expert1-full-m1", "data1-fsdp32-expert1-none-m1"),
                      ("data1-fsdp32-expert1-full-m2", "data1-fsdp32-expert1-full-m1"),
                      ("data1-fsdp32-expert1-full-m1", "data32-fsdp1-expert1-full-m1")):
    assert coarse(cheap).bytes < coarse(dear).bytes
  assert (coarse("data1-fsdp4-expert8-none-m1").seconds
          < coarse("data1-fsdp4-expert8-full-m1").seconds)
  assert (coarse("data1-fsdp32-expert1-full-m1").seconds
          < coarse("data1-fsdp32-expert1-full-m8").seconds)  # weights are gathered eight times


def test_an_exchange_costs_what_the_collectives_say():
  """And so the layout that is documented as the fastest is among the first that are compiled."""
  where = topology.parse("v5p-64")
  tried = search.candidates(REFERENCE, where, tries=4)
  assert any(layout.config.execution.mesh.expert == 8 for layout, _ in tried)
  assert coarse_lib._seconds_a_byte(1, where) == 0
  one_way = where.hardware.link_bytes_per_second / where.hardware.devices_per_chip / 6
  for expert, extent in ((2, 2), (8, 2), (16, 4), (64, 4)):
    assert coarse_lib._seconds_a_byte(expert, where) == pytest.approx(extent / (4 * one_way))


def test_what_is_left_to_data_is_counted():
  """-1 in a mesh is all the devices that are left: their gradients are summed, too."""
  where = topology.parse("v5p-64")
  told, left = (override(REFERENCE.config, {"execution.mesh.data": data, "execution.mesh.fsdp": 2,
                                            "execution.mesh.expert": 1}) for data in (16, -1))
  assert coarse_lib.step_seconds(told, where) == coarse_lib.step_seconds(left, where)


def test_what_cannot_fit_comes_last():
  where = topology.parse("v5litepod-8")
  found = search.layouts(REFERENCE.config, where)
  there = 1.25 * where.hardware.program_hbm_bytes
  fitting = [layout.bytes <= there for layout in found]
  assert fitting == sorted(fitting, reverse=True) and True in fitting and False in fitting


def test_candidates_differ_in_expert_parallelism():
  tried = search.candidates(REFERENCE, topology.parse("v5p-64"), tries=4)
  assert len(tried) == 4 == len({cell.name for _, cell in tried})
  assert len({layout.config.execution.mesh.expert for layout, _ in tried}) >= 2
  for layout, cell in tried:
    assert cell.config is layout.config and cell.name.startswith(REFERENCE.name)


def test_one_chip_has_as_many_candidates():
  """All have the one size of the expert axis that there is."""
  where = topology.parse("v5litepod-1")
  labels = [layout.label for layout, _ in search.candidates(REFERENCE, where, tries=4)]
  assert labels == [layout.label for layout in search.layouts(REFERENCE.config, where)[:4]]


def test_a_cell_without_any_layout_says_why():
  odd = dataclasses.replace(REFERENCE, config=dataclasses.replace(
      REFERENCE.config, train=dataclasses.replace(REFERENCE.config.train, batch_size=3)))
  with pytest.raises(FieldError, match="batch_size=3"):
    search.candidates(odd, topology.parse("v5p-64"), tries=2)


def test_a_cell_without_any_layout_is_its_own_row_and_the_others_are_searched():
  where = topology.parse("v5p-64")
  odd = dataclasses.replace(REFERENCE, name="odd", config=dataclasses.replace(
      REFERENCE.config, train=dataclasses.replace(REFERENCE.config.train, batch_size=3)))
  compiled = []

  def plan_cells(variants):
    compiled.extend(variants)
    return [cells.Plan(cell.name, cell.config, where,
                       {"seconds": 1.0 + i, "memory": {"peak": 1}})
            for i, cell in enumerate(variants)]

  plans, chosen, words = search.recommend([odd, REFERENCE], where, 2, plan_cells)
  assert [plan.cell for plan in plans] == ["odd", *(cell.name for cell in compiled)]
  assert len(compiled) == 2 and chosen[0].fits is None and chosen[1] is plans[1]
  first, second, _ = words.splitlines()
  assert first.startswith("odd: config.train.batch_size=3: ") and "1000.0 ms" in second


def plan(layout, seconds, gib):
  where = topology.parse("v5p-64")
  result = {"seconds": seconds, "memory": {"peak": gib * 2**30}} if seconds else {}
  return cells.Plan("cell", layout.config, where, result, error="" if seconds else "failed")


def test_the_fastest_that_fits_is_recommended():
  layouts = [layout for layout, _ in search.candidates(REFERENCE, topology.parse("v5p-64"), 4)]
  tried = list(zip(layouts, [plan(layouts[0], 0.1, 200), plan(layouts[1], 0.5, 20),
                             plan(layouts[2], 0.4, 20), plan(layouts[3], None, 0)], strict=True))
  assert search.best(tried) is tried[2][1]
  lines = search.verdict(REFERENCE, tried).splitlines()
  assert lines[0] == f"{REFERENCE.name}: 400.0 ms a step with {layouts[2].flags}"
  assert lines[1:] == [f"  +25.0% with {layouts[1].label}"]
  assert "none of the 1 compiled layouts" in search.verdict(REFERENCE, tried[:1])


def test_its_flags_choose_it():
  layout = search.layouts(REFERENCE.config, topology.parse("v5p-64"))[3]
  changes = dict(cli.parse_override(flag) for flag in layout.flags.split())
  assert select("experiments/reference.py", changes)[0].config == layout.config
