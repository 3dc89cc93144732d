"""No damage to any file of a checkpoint goes unnoticed, and none is used."""

import json
import logging
import os
import pathlib

import pytest

from moe_jax.train import checkpoint, checkpoint_files, checksums
from moe_jax.train.checkpoint import Checkpointer, CheckpointError
from tests.train.checkpoint_states import (
  abstract,
  assert_same,
  files_below,
  flip_a_byte,
  listing,
  restore,
  restore_params,
  state_at,
  truncate,
  write,
)


def test_damage_to_any_file_is_noticed_and_the_previous_checkpoint_used(run_dir, caplog):
  """Each file is hurt in every way; a step that was thrown away can be saved again."""
  write(run_dir, [1, 2])
  marks = {"_CHECKPOINT_METADATA", "commit_success.txt"}  # carry no value that is read
  files = [f for f in files_below(run_dir.checkpoints / "2")
           if f.parent.name != "2" or f.name not in marks]
  assert len(files) > 20
  pristine = {f: f.read_bytes() for f in files_below(run_dir.path)}
  hurts = (flip_a_byte, truncate, os.remove)
  for number, file in enumerate([*files, pathlib.Path(run_dir.checksums(2))]):
    for hurt in hurts:
      hurt(file)
      assert checksums.damage(run_dir.checkpoints / "2", run_dir.checksums(2)), (file, hurt)
      file.write_bytes(pristine[file])
    hurts[number % 3](file)
    caplog.clear()
    restored = restore(run_dir)
    assert restored.step == 1
    assert_same(restored.state, state_at(1))
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert "checkpoints/2 is damaged" in warning and "\n" not in warning
    if file in files:
      assert str(file.relative_to(pathlib.Path(run_dir.checkpoints / "2"))) in warning
    assert checkpoint_files.checkpoint_steps(run_dir) == [1]
    for path, content in pristine.items():
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(content)
  os.remove(files[0])
  with Checkpointer(run_dir, 2) as checkpointer:
    assert checkpointer.restore_latest(abstract(state_at(0))).step == 1
    checkpointer.save(2, state_at(2), {}, {})
  assert restore(run_dir).step == 2


def test_damage_to_the_marks_of_the_commit_does_no_harm(run_dir):
  for hurt in (flip_a_byte, truncate, os.remove):
    for name in ("_CHECKPOINT_METADATA", "commit_success.txt"):
      step = (checkpoint_files.checkpoint_steps(run_dir) or [0])[-1] + 1
      write(run_dir, [step])
      hurt(pathlib.Path(run_dir.checkpoints / str(step) / name))
      assert_same(restore(run_dir).state, state_at(step))


def test_a_file_that_the_checksums_do_not_know_is_damage(run_dir):
  write(run_dir, [1, 2])
  (run_dir.checkpoints / "2" / "params" / "stray").write_text("x")
  assert restore(run_dir).step == 1


def test_no_sound_checkpoint_ends_in_one_line_and_deletes_nothing(run_dir):
  write(run_dir, [1, 2])
  for step in (1, 2):
    flip_a_byte(max(files_below(run_dir.checkpoints / str(step) / "params"),
                    key=lambda f: f.stat().st_size))
  before = listing(run_dir)
  with pytest.raises(CheckpointError, match=r"(?s)^no checkpoint in .* is sound .*2: params/"
                     r".*1: params/.*train from step 0$") as caught:
    restore(run_dir)
  assert "\n" not in str(caught.value)
  assert listing(run_dir) == before


def test_lost_checksums_do_not_silently_start_over(run_dir):
  write(run_dir, [1])
  (run_dir.path / "checksums").rmtree()
  with pytest.raises(CheckpointError, match="1: it has no checksums"):
    restore(run_dir)


def test_params_of_damaged_or_absent_checkpoints(run_dir, caplog):
  wanted = abstract(state_at(0)["params"])
  with pytest.raises(CheckpointError, match="holds no finished checkpoint"):
    restore_params(run_dir, wanted)
  write(run_dir, [1, 2])
  flip_a_byte(files_below(run_dir.checkpoints / "2" / "params")[0])
  before = listing(run_dir)
  assert restore_params(run_dir, wanted)[0] == 1
  assert "checkpoints/2 is damaged and is skipped" in caplog.text
  with pytest.raises(CheckpointError, match="checkpoints/2 is damaged: params/"):
    restore_params(run_dir, wanted, step=2)
  with pytest.raises(CheckpointError, match="holds no checkpoint 7: it has 1, 2"):
    restore_params(run_dir, wanted, step=7)
  assert listing(run_dir) == before


def test_checksums_are_plain_json(run_dir):
  write(run_dir, [1])
  listed = json.loads(run_dir.checksums(1).read_text())
  assert set(listed["meta/metadata"]) == {"bytes", "sha256"}


def test_damage_to_any_file_is_found_by_an_evaluation_too(run_dir):
  """Each file of the newest checkpoint is hurt in turn: what comes back is never its content."""
  write(run_dir, [1, 2])
  wanted = abstract(state_at(0)["params"])
  for file in files_below(run_dir.checkpoints / "2"):
    pristine = file.read_bytes()
    for hurt in (flip_a_byte, truncate):
      hurt(file)
      step, params, _ = restore_params(run_dir, wanted)
      item = file.relative_to(run_dir.checkpoints / "2").parts[0]
      assert step == (1 if item in ("params", "meta") else 2), (file, hurt)
      assert_same(params, state_at(step)["params"])
      file.write_bytes(pristine)


def test_damage_to_any_file_is_found_by_a_branch(run_dir):
  """It wants that step and no earlier one."""
  write(run_dir, [1, 2])
  marks = {"_CHECKPOINT_METADATA", "commit_success.txt"}
  for file in files_below(run_dir.checkpoints / "1"):
    pristine = file.read_bytes()
    flip_a_byte(file)
    if file.name in marks and file.parent.name == "1":
      assert_same(checkpoint.restore_step(run_dir, 1, abstract(state_at(0))).state, state_at(1))
    else:
      with pytest.raises(CheckpointError, match="checkpoints/1 is damaged: .* its checksum"):
        checkpoint.restore_step(run_dir, 1, abstract(state_at(0)))
    file.write_bytes(pristine)
  with pytest.raises(CheckpointError, match="holds no checkpoint 7: it has 1, 2"):
    checkpoint.restore_step(run_dir, 7, abstract(state_at(0)))


def test_a_finished_run_knows_whether_its_end_is_there(run_dir):
  assert checkpoint_files.lost_end(run_dir, 2) is None  # all were deleted: somebody's wish
  write(run_dir, [1, 2])
  assert checkpoint_files.lost_end(run_dir, 2) is None
  assert checkpoint_files.lost_end(run_dir, 3) == "its last checkpoint is that of step 2 of 3"
  flip_a_byte(files_below(run_dir.checkpoints / "2" / "optimizer")[0])
  assert checkpoint_files.lost_end(run_dir, 2).startswith(
      "its last checkpoint is damaged: optimizer/")
