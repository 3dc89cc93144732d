"""What surrounds the compiler; plan_test.py runs it."""

import dataclasses
import gzip
import importlib.metadata
import importlib.util
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_jax import cli, fields
from moe_jax.arch import count
from moe_jax.config import MeshConfig, resolve_mesh
from moe_jax.errors import FieldError
from moe_jax.files import csv_text
from moe_jax.plan import cells, coarse, compilers, cost, table, topology, worker
from tests.small import small_config

V5P = topology.parse("v5p-16")
RESULT = {"mesh": {"data": 8, "fsdp": 1, "expert": 1}, "compile_seconds": 2.0,
          "memory": {"peak": 15 * 2**30, "arguments": 10 * 2**30,
                     "temporaries": 6 * 2**30, "outputs": 0, "code": 0},
          "seconds": 0.5, "estimated_seconds": 0.4, "priced_seconds": 0.1,
          "estimated_cycles": 7e8, "flops": 10**12, "parts": dict.fromkeys(cost.PARTS, 0.0),
          "collectives": [{"kind": "all-gather", "axes": "fsdp", "bytes": 5,
                           "exposed_seconds": 0.1, "hidden_seconds": 0.0}], "dearest": []}


def config(batch_size=32):
  base = small_config()
  return dataclasses.replace(
      base, train=dataclasses.replace(base.train, batch_size=batch_size),
      execution=dataclasses.replace(base.execution, mesh=MeshConfig()))


def plan(**changes) -> cells.Plan:
  return dataclasses.replace(cells.Plan("cell", config(), V5P, RESULT), **changes)


def test_what_a_plan_derives():
  found = plan()
  assert found.fits and found.hbm_needed == 15 * 2**30  # which is not the sum of its parts
  assert found.tokens_per_second == pytest.approx(found.config.batch_tokens / 0.5)
  assert found.chip_hours == pytest.approx(0.5 * found.config.train.steps * 8 / 3600)
  assert found.usd(4.2) == pytest.approx(4.2 * found.chip_hours)
  assert found.usd(None) is None
  useful = count.training_flops_per_token(found.config.arch, found.config.data.seq_len)
  assert found.mfu == pytest.approx(useful * found.tokens_per_second / (8 * 459e12))


def test_a_program_that_is_too_large_says_by_how_much():
  found = plan(result={}, error="RESOURCE_EXHAUSTED", needs=100 * 2**30,
               remedy="--config.execution.remat=full", remedy_seconds=0.75)
  assert found.fits is False and found.seconds is None
  assert found.chip_hours == pytest.approx(1.5 * plan().chip_hours)  # it runs with its remedy
  assert dataclasses.replace(found, remedy="", remedy_seconds=None).usd(1.0) is None
  line = cells.verdict(found)
  assert "needs 100.00 GiB of 95.74, 4.26 GiB over" in line
  assert found.hbm_left == pytest.approx(-4.26 * 2**30)
  assert line.endswith("fits with --config.execution.remat=full, 750.0 ms a step")


OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G "
                 "hbm. Exceeded hbm capacity by 4.75G.")


def test_what_xla_says_of_memory():
  known = {"hbm_needed": 20.5 * 2**30, "hbm_there": 15.75 * 2**30}
  assert worker._memory_asked(OUT_OF_MEMORY) == known
  said = ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
          "temporaries (20.50G) exceeds available HBM (15.75G).")
  assert worker._memory_asked(said) == known
  assert worker._memory_asked("another error") == {}
  assert worker._memory_asked(said.replace("on HBM", "in memory space vmem").replace(
      "HBM", "vmem")) == {}
  assert worker._memory_asked("memory space vmem. Used 18.50M of 16.00M vmem.") == {}


def test_what_does_not_fit_by_a_little_is_told_by_what_xla_lets_a_program_have():
  result = {"error": "RESOURCE_EXHAUSTED", "hbm_needed": 15.9 * 2**30, "hbm_there": 15.75 * 2**30}
  found = cells._plan_of("cell", config(), topology.parse("v5litepod-8"), result)
  assert found.fits is False
  assert "needs 15.90 GiB of 15.75, 0.15 GiB over" in cells.verdict(found)


def test_what_fits_is_judged_by_what_a_program_can_have():
  """Not by what the chip has: between the two XLA refuses."""
  memory = RESULT["memory"] | {"peak": 15.9 * 2**30}
  found = plan(topology=topology.parse("v5litepod-8"), result=RESULT | {"memory": memory})
  assert found.fits is False and found.hbm_there == 15.75 * 2**30
  assert found.hbm_left == pytest.approx(-0.15 * 2**30)


@given(st.sampled_from(["none", "dots", "full"]), st.sampled_from([1, 2, 4]),
       st.sampled_from([MeshConfig(), MeshConfig(fsdp=2), MeshConfig(data=8), MeshConfig(4, 2)]),
       st.sampled_from([32, 64]))
def test_remedies_are_valid_and_save(remat, microbatches, mesh, batch_size):
  base = config(batch_size)
  base = dataclasses.replace(base, execution=dataclasses.replace(
      base.execution, remat=remat, microbatches=microbatches, mesh=mesh))
  resolve_mesh(base, V5P.devices)
  changes = list(cells.changes_that_save(base, V5P))
  assert changes
  for words, changed in changes:
    resolve_mesh(changed, V5P.devices)
    assert changed != base and changed.execution.remat == "full"
    assert changed.execution.microbatches >= microbatches
    assert changed.execution.mesh.fsdp >= mesh.fsdp
    assert fields.override(base, dict(map(cli.parse_override, words.split()))) == changed


def large(needs: float) -> cells.Plan:
  """1.3B parameters, whole on each of eight chips of 16 GiB: 19 GiB of state alone."""
  base = config(8)
  base = dataclasses.replace(
      base, arch=dataclasses.replace(base.arch, n_layers=1, d_model=8192, d_expert=6000, n_exp=8,
                                     n_heads=64),
      execution=dataclasses.replace(base.execution, remat="full"))
  return plan(config=base, topology=topology.parse("v5litepod-8"), result={}, error="too large",
              needs=needs)


def test_state_that_is_too_large_is_split_and_not_the_batch():
  """A sum of gradients over microbatches is one more copy of what is too large already."""
  found = large(17.9 * 2**30)
  first, *_ = [words for words, _ in cells._promising(found)]
  assert first == "--config.execution.mesh.fsdp=2"
  parts = dataclasses.replace(found.config, execution=dataclasses.replace(
      found.config.execution, microbatches=2))
  more, less = (coarse.device_bytes(each, found.topology) for each in (parts, found.config))
  assert more > less + 3 * count.n_total(found.config.arch)


def test_what_cannot_save_enough_is_not_compiled(tmp_path, monkeypatch):
  """Of each kind of change one is tried, which is guessed to save what is missing."""
  tried = []

  def compiled(name, changed, where, out):
    tried.append(changed.execution)
    return cells.Plan(name, changed, where, {}, "too large", 2.0 * where.hardware.program_hbm_bytes)

  monkeypatch.setattr(cells, "plan_config", compiled)
  base = config(2048)
  base = dataclasses.replace(base, execution=dataclasses.replace(base.execution, remat="full"))
  there = V5P.hardware.program_hbm_bytes
  monkeypatch.setattr(cells.coarse, "device_bytes",
                      lambda changed, where: 8 * there / changed.execution.microbatches)
  for missing, counts in ((0.1, [2]), (5.0, [4]), (7.6, [32]), (100.0, [])):
    tried.clear()
    found = plan(config=base, result={}, error="too large", needs=(1 + missing) * there)
    assert cells._with_remedy(found, tmp_path) == found
    assert [execution.microbatches for execution in tried] == counts


def test_the_remedy_that_is_guessed_to_be_fastest_is_tried_first(tmp_path, monkeypatch):
  changes = [(f"m{times}", dataclasses.replace(config(2048), execution=dataclasses.replace(
      config().execution, microbatches=times))) for times in (2, 4, 8)]
  tried = []

  def compiled(name, changed, where, out):
    tried.append(changed.execution.microbatches)
    result = RESULT | {"seconds": 0.7} if changed.execution.microbatches < 8 else {}
    return cells.Plan(name, changed, where, result, "" if result else "x", 1e12)

  monkeypatch.setattr(cells, "plan_config", compiled)
  monkeypatch.setattr(cells, "_promising", lambda _: iter(changes))
  monkeypatch.setattr(cells.coarse, "step_seconds",
                      lambda changed, where: -changed.execution.microbatches)
  found = cells._with_remedy(plan(result={}, error="too large", needs=1e12), tmp_path)
  assert tried == [8, 4] and (found.remedy, found.remedy_seconds) == ("m4", 0.7)


def test_a_batch_that_does_not_divide_is_that_cells_row(tmp_path):
  found = cells.plan_config("cell", config(batch_size=4), V5P, tmp_path)
  assert found.fits is None and "config.train.batch_size=4" in found.error
  assert cells.verdict(found).startswith("failed: config.train.batch_size")
  assert not list(tmp_path.iterdir())


def test_without_libtpu_the_command_that_installs_it_is_named(monkeypatch):
  versions = worker.versions() | {"libtpu": None}
  monkeypatch.setattr(worker, "versions", lambda: versions)
  with pytest.raises(FieldError, match=r"='v5p-16'.*libtpu.*not installed: pip install 'jax\[tpu"):
    cells.check_libtpu(V5P)


def test_another_libtpu_than_jax_wants_is_refused(monkeypatch):
  versions = worker.versions() | {"libtpu": "0.0.1"}
  monkeypatch.setattr(worker, "versions", lambda: versions)
  with pytest.raises(FieldError, match=r"libtpu 0.0.1.*requires libtpu==.*pip install"):
    cells.check_libtpu(V5P)


def test_a_record_of_libtpu_without_its_files_is_refused(tmp_path, monkeypatch):
  (wanted,) = [text for text in importlib.metadata.requires("jax") if text.startswith("libtpu")]
  version = wanted.partition(";")[0].partition("==")[2].strip().replace("*", "0")
  versions = worker.versions() | {"libtpu": version}
  monkeypatch.setattr(worker, "versions", lambda: versions)
  (tmp_path / "libtpu").mkdir()
  monkeypatch.syspath_prepend(str(tmp_path))  # found first, and without code
  with pytest.raises(FieldError, match=r"without its files: pip install 'jax\[tpu.*reinstall"):
    cells.check_libtpu(V5P)


@pytest.mark.parametrize("damage", ["", "{", "[]", "{}", '{"memory": {}}', '{"error": "gone"}',
                                    '{"hbm_needed": 1}'])
def test_a_damaged_plan_is_made_anew(tmp_path, damage, monkeypatch):
  monkeypatch.setattr(compilers, "compile_apart", lambda *_: RESULT)
  file = tmp_path / "_plans" / f"{cells._key(config(), V5P)}.json"
  file.parent.mkdir()
  file.write_text(damage)
  assert cells.known_plan("cell", config(), V5P, tmp_path) is None
  assert cells.plan_config("cell", config(), V5P, tmp_path).fits
  assert json.loads(file.read_text()) == RESULT
  assert cells.known_plan("cell", config(), V5P, tmp_path).fits


def test_a_plan_that_cannot_be_kept_is_not_lost(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(compilers, "compile_apart", lambda *_: RESULT)
  (tmp_path / "_plans").write_text("a file where a folder belongs")
  assert cells.plan_config("cell", config(), V5P, tmp_path).fits
  assert "the plan of cell cannot be saved" in capsys.readouterr().err


def test_a_damaged_program_is_compiled_anew(tmp_path, monkeypatch):
  class Lowered:
    def compile(self):
      raise RuntimeError(OUT_OF_MEMORY)

  monkeypatch.setattr(worker, "_program_key", lambda *_: "key")
  for damage in (b"", b"not gzip", gzip.compress(b"{}")[:-4], gzip.compress(b"[")):
    (tmp_path / "key.json.gz").write_bytes(damage)
    found = worker._compiled(Lowered(), [], V5P, str(tmp_path))
    assert found["hbm_needed"] == 20.5 * 2**30
  assert worker._compiled(None, [], V5P, str(tmp_path)) == found  # kept


def test_a_program_is_named_by_what_the_compiler_is_told(monkeypatch):
  class Lowered:
    def as_text(self, debug_info=False):
      return "a program"

  places = [(0, 0, 0, 0, 0), (0, 1, 0, 0, 0)]
  plain = worker._program_key(Lowered(), places, V5P)
  assert worker._program_key(Lowered(), list(places), V5P) == plain
  assert worker._program_key(Lowered(), places[::-1], V5P) != plain  # the text is the same
  monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_tpu_a=1")
  assert worker._program_key(Lowered(), places, V5P) != plain


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_compiled(tmp_path, monkeypatch):
  monkeypatch.setattr(cells, "check_libtpu", lambda _: None)
  (tmp_path / "file").touch()
  for out, hlo, field in ((tmp_path / "file", None, "out"),
                          (tmp_path / "runs", tmp_path / "file" / "hlo", "hlo_out")):
    with pytest.raises(FieldError, match=f"^{field}="):
      cells.plan_cells([None], V5P, out, hlo_out=hlo and str(hlo))


def test_a_plan_is_named_by_all_that_decides_it(monkeypatch):
  a = cells._key(config(), V5P)
  assert a == cells._key(config(), V5P)
  remat = dataclasses.replace(config(), execution=dataclasses.replace(
      config().execution, remat="full"))
  others = [cells._key(remat, V5P), cells._key(config(64), V5P),
            cells._key(config(), topology.parse("v5p-32")),
            cells._key(config(), topology.parse("v5p-16", 2))]
  monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_tpu_a=1")
  others.append(cells._key(config(), V5P))
  monkeypatch.delenv("LIBTPU_INIT_ARGS")
  for name in ("JAX_DEFAULT_MATMUL_PRECISION", "JAX_ENABLE_X64"):
    monkeypatch.setenv(name, "1")
    others.append(cells._key(config(), V5P))
    monkeypatch.delenv(name)
  assert len({a, *others}) == 8
  for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_PLATFORMS", "JAX_LOGGING_LEVEL"):
    monkeypatch.setenv(name, "another")
  assert cells._key(config(), V5P) == a


def test_tables_hold_every_plan():
  plans = [plan(), plan(cell="large", result={}, error="too large", needs=1e12),
           plan(cell="bad", result={}, error="a reason")]
  rows = [table.row(found, 4.2) for found in plans]
  assert [flat["fits"] for flat in rows] == [True, False, None]
  assert rows[0]["all-gather[fsdp]_bytes"] == 5 and rows[0]["hbm_left"] == 80.74 * 2**30
  (moved,) = (list(column.cells) for column in table.collectives(plans).columns[1:2])
  assert moved == ["all-gather over fsdp"]
  text = csv_text(rows)
  assert len(text.splitlines()) == 4 and "a reason" in text
  json.dumps(rows)
  assert table.table(plans, 4.2).row_count == 3
  # By XLA, which has another limit; no remedy.
  compiled_too_large = plan(topology=topology.parse("v5litepod-8"), result=RESULT | {
      "memory": RESULT["memory"] | {"peak": 15.9 * 2**30}})
  assert compiled_too_large.chip_hours is None
  assert table.table([compiled_too_large], 4.2).row_count == 1
  words = table.summary(plans, 4.2)
  assert words.startswith("1 of 3 cells planned on v5p-16 (2 excluded from the sum): ")
  assert "uncalibrated" in words and "at least" not in words
  plans[1] = dataclasses.replace(plans[1], remedy="x", remedy_seconds=0.5)
  assert table.summary(plans, 4.2).startswith(
      "2 of 3 cells planned on v5p-16 (1 with the remedy under which it fits, 1 excluded from the "
      f"sum): {2 * plans[0].chip_hours:.4g} chip-hours")
  assert "USD" not in table.summary(plans, None)


def test_a_memory_profile_lists_buffers_or_says_why_there_are_none():
  buffer = {"bytes": 3 * 2**20, "shape": "f32[9]", "op_name": "op", "source": "/x/moe_jax/a.py:7"}
  first, second = table.memory_profile(plan(result=RESULT | {"largest": [buffer]})).splitlines()
  assert first.startswith("cell: the largest") and second.split() == [
      "3.0", "MiB", "f32[9]", "a.py:7"]
  refused = plan(result={}, error="too large", needs=1e12)
  assert table.memory_profile(refused).startswith("cell: no buffers are known")


def test_sizes_have_a_line_each():
  def rows(*sizes):
    for n_total, seconds, fits in sizes:
      yield table.row(plan(), 4.2) | {"n_total": n_total, "step_seconds": seconds, "fits": fits,
                                      "chip_hours": seconds and 100 * seconds,
                                      "usd": seconds and 420 * seconds, "mfu": seconds}

  shown = table.by_size(list(rows((99, 0.2, True), (31, 0.1, True), (30, 0.3, True),
                                  (101, None, False), (1000, None, None))))
  columns = {column.header: list(column.cells) for column in shown.columns}
  assert columns["N_total"] == ["30.5", "100", "1k"]
  assert columns["cells"] == ["2", "2", "1"] and columns["fit"] == ["2", "1", "0"]
  assert columns["step ms"] == ["100 to 300", "200", ""]
  assert columns["chip-hours"] == ["40", "20", "0"]
  assert columns["USD"] == ["168", "84", ""]
  remedied = list(rows((30, 0.1, True), (31, None, False), (99, 0.2, True)))
  remedied[1]["chip_hours"] = 7
  (hours,) = (list(column.cells) for column in table.by_size(remedied).columns
              if column.header == "chip-hours")
  assert hours == ["17", "20"]
  assert table.by_size(list(rows((30, 0.1, True), (31, 0.1, True)))) is None
  assert table.by_size(list(rows((30, 0.1, True), (60, 0.1, True)))) is None
