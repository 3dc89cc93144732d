"""A grid is evaluated cell by cell: what is broken is named, and stops nothing else."""

import dataclasses
import pathlib
import shutil

import jax
import numpy as np
import pytest

from moe_jax import run_dir as run_dir_lib
from moe_jax.data.prepare import prepare
from moe_jax.errors import FieldError
from moe_jax.evaluate import compare, heldout, results
from moe_jax.evaluate.cells import evaluate_cells, parse_steps, survey
from moe_jax.evaluate.text import Text
from moe_jax.run_dir import RunDir
from moe_jax.train import checksums
from tests.evaluate.conftest import STATUS, cells_of, finish
from tests.train.checkpoint_states import files_below, flip_a_byte


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
  devices = jax.devices()[:1]
  monkeypatch.setattr(jax, "devices", lambda: devices)
  yield
  jax.config.update("jax_compilation_cache_dir", None)  # evaluate_cells set it


def evaluate(cells, out):
  said = []
  failed = evaluate_cells(cells, out, said.append)
  assert all("\n" not in line for line in said) and set(failed) <= set(said)
  return said, failed


def result_of(out, cell):
  return RunDir.of(out, cell).read_evals().get("heldout")


def damage(folder):
  flip_a_byte(max(files_below(folder), key=lambda file: file.stat().st_size))


def test_survey_tells_how_each_cell_stands(out):
  cells = cells_of(seeds=6)
  states = {1: run_dir_lib.FINISHED, 2: run_dir_lib.PREEMPTED, 3: run_dir_lib.DIVERGED}
  for index, state in states.items():
    run_dir = RunDir.of(out, cells[index])
    run_dir.claim(cells[index])
    run_dir.write_status({**STATUS, "state": state,
                          "error": "loss is nan\nat 3" if index == 3 else None})
  RunDir.of(out, cells[4]).claim(cells[4])
  other = dataclasses.replace(cells[5], config=dataclasses.replace(
      cells[5].config, seed_data=9))
  RunDir.of(out, cells[5]).claim(other)
  found = survey(cells, out)
  assert found.finished == [cells[1]]
  names = [cell.name for cell in cells]
  assert found.unfinished == [
      f"{names[0]}: skipped: not trained yet", f"{names[2]}: skipped: preempted, step 4 of 4",
      f"{names[3]}: skipped: diverged, step 4 of 4: loss is nan at 3",
      f"{names[4]}: skipped: not trained yet"]
  (refused,) = found.refused
  assert refused.startswith(names[5]) and "seed_data is 0 here and 9 there" in refused


def test_each_finished_cell_once_and_again_when_its_checkpoint_changes(out):
  cells = cells_of()
  for cell in cells:
    finish(out, cell)
  said, failed = evaluate(cells, out)
  assert not failed and len(said) == 2
  first = result_of(out, cells[0])
  assert first["step"] == 4 and first["n_devices"] == 1
  assert first["unigram_loss"] > 2 and 5 < first["loss"] < 7  # nothing was trained
  assert first["loss"] != result_of(out, cells[1])["loss"]

  said, _ = evaluate(cells, out)
  assert all(line.endswith("already evaluated") for line in said)
  finish(out, cells[0], steps=(6,))
  said, _ = evaluate(cells, out)
  assert "step 6" in said[0] and said[1].endswith("already evaluated")


def test_documents_that_are_gone_or_damaged_are_made_again(out):
  cells = cells_of()
  for cell in cells:
    finish(out, cell)
  evaluate(cells, out)
  pair = tuple(cell.name for cell in cells)
  told = compare.compare(out, cells, pair, "heldout")
  files = [RunDir.of(out, cell).documents("heldout") for cell in cells]
  files[0].unlink()
  files[1].write_bytes(files[1].read_bytes()[:100])
  with pytest.raises(FieldError, match="whose heldout.npz is missing or damaged: evaluate it"):
    compare.compare(out, cells, pair, "heldout")
  said, failed = evaluate(cells, out)
  assert not failed and not any(line.endswith("already evaluated") for line in said)
  assert compare.compare(out, cells, pair, "heldout") == told


def test_another_content_of_the_same_step_is_evaluated_again(out):
  """As after a last checkpoint that was damaged and made once more."""
  cells = cells_of()
  run_dirs = [finish(out, cell) for cell in cells]
  evaluate(cells, out)
  before = result_of(out, cells[0])
  for folder in ("checkpoints", "checksums"):
    shutil.rmtree(run_dirs[0].path / folder)
    shutil.copytree(run_dirs[1].path / folder, run_dirs[0].path / folder)
  said, _ = evaluate(cells, out)
  assert "step 4" in said[0] and not said[0].endswith("already evaluated")
  assert result_of(out, cells[0])["loss"] == result_of(out, cells[1])["loss"] != before["loss"]


def test_a_damaged_checkpoint_is_passed_over_and_the_row_tells_its_step(out):
  (cell,) = cells_of(seeds=1)
  run_dir = finish(out, cell)
  damage(run_dir.checkpoints / "4" / "params")
  said, failed = evaluate([cell], out)
  assert not failed and "step 2" in said[0] and result_of(out, cell)["step"] == 2


def test_what_is_broken_is_named_and_the_others_are_evaluated(out):
  cells = cells_of(seeds=4)
  ruined = finish(out, cells[0])
  for step in (2, 4):
    damage(ruined.checkpoints / str(step) / "params")
  finish(out, cells[1], fingerprint="of-another-text")
  finish(out, cells[2])
  finish(out, cells[3])
  eval_file = RunDir.of(out, cells[3]).path / "eval" / "heldout.json"
  eval_file.parent.mkdir()
  eval_file.write_text('{"loss": ')
  said, failed = evaluate(cells, out)
  assert len(said) == 4 and len(failed) == 2
  assert "no checkpoint" in failed[0] and "is sound" in failed[0]
  assert "the text has changed" in failed[1] and "of-another-text" in failed[1]
  assert result_of(out, cells[0]) is None and result_of(out, cells[1]) is None
  assert result_of(out, cells[2])["loss"] > 0 and result_of(out, cells[3])["loss"] > 0


def test_a_result_that_cannot_be_written_is_named_and_the_others_are(out):
  cells = cells_of()
  (finish(out, cells[0]).path / "eval").write_text("a file where a folder must be")
  finish(out, cells[1])
  said, (failed,) = evaluate(cells, out)
  assert len(said) == 2 and "/eval" in failed and cells[0].name in failed
  assert result_of(out, cells[1])["loss"] > 0


def test_all_checkpoints_of_a_run_make_a_curve(out):
  (cell,) = cells_of(seeds=1)
  run_dir = finish(out, cell)
  said = []
  assert evaluate_cells([cell], out, said.append, steps=None) == [] and len(said) == 3
  assert run_dir.evaluated_steps() == [2, 4]
  rows = results.curve_rows_of(run_dir, "heldout")
  assert [row["step"] for row in rows] == [2, 4]
  assert result_of(out, cell) == run_dir.read_eval("heldout", 4)
  routing = run_dir.read_eval("routing", 2)
  assert routing["agreement"] == [1, 1]  # nothing was trained in between
  assert run_dir.read_eval("routing")["step"] == 4
  assert len(results.rows_of(run_dir)) == 1  # routing.json is no loss
  said.clear()
  evaluate_cells([cell], out, said.append, steps=(2,))
  assert [line.endswith("already evaluated") for line in said] == [True, True]
  (failed,) = evaluate_cells([cell], out, said.append, steps=(3,))
  assert "has no such checkpoint: it has 2, 4" in failed


def test_any_split_of_any_corpus_and_a_comparison_over_its_documents(out):
  cells = cells_of()
  run_dirs = [finish(out, cell) for cell in cells]
  same = Text(corpus="small")
  for text in (Text(), Text("train"), same):
    assert evaluate_cells(cells, out, lambda line: None, text) == []
  found = [run_dirs[0].read_eval(name) for name in ("heldout", "small-heldout", "train")]
  assert found[0]["loss"] == found[1]["loss"] != found[2]["loss"]
  assert found[2]["heldout_documents"] > found[0]["heldout_documents"]
  pair = (cells[0].name, cells[1].name)
  lines = compare.compare(out, cells, pair, "heldout")
  difference = found[0]["loss"] - result_of(out, cells[1])["loss"]
  assert f"all: {difference:+.4f} nats per token" in lines[1]
  with pytest.raises(FieldError, match="has no evaluation on nothing"):
    compare.compare(out, cells, pair, "nothing")


def test_another_corpus_is_cut_by_the_tokenizer_of_the_run(out):
  config = cells_of(seeds=1)[0].config
  data = dataclasses.replace(config.data, tokenizer="bpe-300")
  arch = dataclasses.replace(config.arch, vocab_size=300)
  own = prepare(data, out / "_data")
  text = Text(corpus="small")
  found = text.prepare(dataclasses.replace(config, data=data, arch=arch), out / "_data", own)
  assert found.card["tokenizer"].startswith("bpe-300-")
  np.testing.assert_array_equal(found.splits["heldout"].tokens_N, own.splits["heldout"].tokens_N)


@pytest.mark.parametrize("make, message", [
    (lambda: Text("held"), "must be heldout or train; did you mean 'heldout'"),
    (lambda: Text(corpus="No Such"), "must be the name of a corpus"),
    (lambda: parse_steps("last"), "must be all, or steps"),
    (lambda: parse_steps("0,5"), "must be all, or steps")])
def test_a_text_or_steps_that_cannot_be_are_refused(make, message):
  with pytest.raises(FieldError, match=message) as error:
    make()
  assert "\n" not in str(error.value)


def test_a_tokenizer_that_the_vocabulary_does_not_hold_is_one_line(out):
  """As of a run whose data were prepared anew by another tokenizer of the same name."""
  (cell,) = cells_of(seeds=1)
  run_dir = finish(out, cell)
  own = prepare(cell.config.data, out / "_data")
  own.card["vocab_size"] = 999
  with pytest.raises(FieldError, match="must be at least the 999 tokens of the tokenizer"):
    heldout.evaluate(cell, run_dir, own)


def test_a_checkpoint_of_another_architecture_is_one_line(out):
  """Its files moved into the directory of another run."""
  (small,), (large,) = (cells_of(seeds=1), [wider(cell) for cell in cells_of(seeds=1)])
  ours, theirs = finish(out, small), finish(out, large)
  for folder in ("checkpoints", "checksums"):
    shutil.rmtree(ours.path / folder)
    shutil.copytree(theirs.path / folder, ours.path / folder)
  said, (failed,) = evaluate([small], out)
  assert "does not fit this configuration" in failed


def wider(cell):
  config = dataclasses.replace(cell.config, arch=dataclasses.replace(cell.config.arch, d_model=32))
  return dataclasses.replace(cell, config=config, name=cell.name + "-wide")


def test_a_checkpoint_written_by_devices_that_are_not_here_is_read(out):
  """Orbax notes devices by number alone, of whatever kind: no hindrance to others."""
  (cell,) = cells_of(seeds=1)
  run_dir = finish(out, cell)
  changed = 0
  for file in pathlib.Path(run_dir.path).rglob("_sharding"):
    content = file.read_text()
    file.write_text(content.replace('\\"id\\": 0', '\\"id\\": 99'))
    changed += content != file.read_text()
  assert changed
  for step in (2, 4):
    checksums.record(run_dir.checkpoints / str(step), run_dir.checksums(step))
  said, failed = evaluate([cell], out)
  assert not failed and "step 4" in said[0]
