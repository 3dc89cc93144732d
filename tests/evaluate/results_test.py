import csv
import dataclasses
import shutil

import pytest
from etils import epath

from moe_jax.arch import count
from moe_jax.config import identity_hash
from moe_jax.evaluate import results
from moe_jax.run_dir import FINISHED, RunDir
from tests.evaluate.conftest import STATUS, cells_of
from tests.small import ARCH


def leave(out, cell, **evaluation):
  run_dir = RunDir.of(out, cell)
  run_dir.claim(cell)
  run_dir.write_status({**STATUS, "state": FINISHED})
  found = {"step": 4, "identity": identity_hash(cell.config), "loss": 2.5, "loss_se": None,
           "load": [[1.0]]}
  run_dir.write_eval("heldout", found | evaluation)
  return run_dir


def test_a_row_holds_what_a_fit_needs(tmp_path):
  (cell,) = cells_of(seeds=1)
  leave(tmp_path, cell)
  (row,), problems = results.collect(tmp_path, "small")
  assert not problems
  tokens = 4 * cell.config.batch_tokens
  expected = {
      "experiment": "small", "cell": cell.name, "identity": identity_hash(cell.config),
      "evaluation": "heldout", "n_exp": 8, "n_topk": 2, "sparsity": 4.0,
      "granularity": 16 / 12, "n_kv_heads": 2, "n_total": count.n_total(ARCH),
      "n_active_with_embedding": count.n_active_with_embedding(ARCH), "tokens": tokens,
      "training_flops": tokens * count.training_flops_per_token(ARCH, 16),
      "learning_rate": cell.config.train.learning_rate, "seed_init": 0, "step": 4,
      "state": "finished", "loss": 2.5, "loss_se": None, "tokens_per_second": 1000.0,
      "commit": "abc", "routing_group_tokens": 16}
  assert expected.items() <= row.items()
  assert "load" not in row


def changed(config, section, **fields):
  return dataclasses.replace(config, **{section: dataclasses.replace(
      getattr(config, section), **fields)})


def test_a_recipe_is_all_but_shape_length_rate_and_seeds(tmp_path):
  (cell,) = cells_of(seeds=1)
  config, recipe = cell.config, results.recipe_hash(cell.config)
  for other in (dataclasses.replace(config, seed_init=7, seed_data=7),
                changed(config, "train", steps=8, learning_rate=0.5),
                changed(config, "arch", n_exp=4, d_model=32, d_expert=16),
                changed(config, "execution", microbatches=2)):
    assert results.recipe_hash(other) == recipe
  for section, fields in (
      ("train", {"beta2": 0.99}), ("train", {"eps": 1e-6}), ("train", {"clip_norm": 2.0}),
      ("train", {"final_learning_rate_fraction": 0.1}), ("train", {"init_from": "old/dense@7"}),
      ("model", {"rope_theta": 5e5}), ("model", {"norm_eps": 1e-5}),
      ("arch", {"tie_embeddings": not config.arch.tie_embeddings}), ("arch", {"qk_norm": "none"})):
    assert results.recipe_hash(changed(config, section, **fields)) != recipe, fields
  leave(tmp_path, cell)
  (row,), _ = results.collect(tmp_path, "small")
  assert row["recipe_hash"] == recipe


def test_the_file_is_made_from_all_that_is_on_disk(tmp_path):
  cells = cells_of(seeds=11)
  for cell in cells:
    leave(tmp_path, cell)
  RunDir.of(tmp_path, cells[0]).write_eval(
      "tasks", {"step": 4, "identity": identity_hash(cells[0].config)})
  rows, _ = results.collect(tmp_path, "small")
  file = epath.Path(tmp_path / "results.csv")
  results.write_csv(file, rows)
  with open(file) as opened:
    read = list(csv.DictReader(opened))
  names = [cell.name for cell in cells]  # s2 before s10
  assert [row["cell"] for row in read] == [names[0], *names]
  assert [row["evaluation"] for row in read[:2]] == ["heldout", "tasks"]
  assert (read[0]["loss"], read[0]["loss_se"], read[1]["loss"]) == ("2.5", "", "")


def test_a_result_of_an_earlier_run_in_the_directory_is_left_out(tmp_path):
  cells = cells_of()
  leave(tmp_path, cells[0], identity="of-another")
  leave(tmp_path, cells[1])
  rows, problems = results.collect(tmp_path, "small")
  assert [row["cell"] for row in rows] == [cells[1].name] and not problems


@pytest.mark.parametrize("name", ["config.json", "status.json", "eval/heldout.json"])
@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_damaged_file_is_named_and_hides_no_other_row(tmp_path, name, content):
  cells = cells_of()
  run_dir = leave(tmp_path, cells[0])
  leave(tmp_path, cells[1])
  (run_dir.path / name).write_text(content)
  rows, (problem,) = results.collect(tmp_path, "small")
  assert [row["cell"] for row in rows] == [cells[1].name]
  assert name in problem and "\n" not in problem


def test_no_experiment_has_no_rows(tmp_path):
  assert results.collect(tmp_path, "nothing") == ([], [])


def test_a_copied_run_is_named_and_does_not_count_twice(tmp_path):
  (cell,) = cells_of(seeds=1)
  run_dir = leave(tmp_path, cell)
  shutil.copytree(run_dir.path, run_dir.path.with_name("copy"))
  rows, (problem,) = results.collect(tmp_path, "small")
  assert [row["cell"] for row in rows] == [cell.name]
  assert problem.startswith("copy: not in results.csv: ") and "is a copy of the run" in problem
