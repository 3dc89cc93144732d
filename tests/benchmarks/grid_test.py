import json

import pytest

from benchmarks import grid
from moe_jax.fields import override
from moe_jax.files import write_json, write_text
from moe_jax.grid import Cell
from moe_jax.run_dir import RunDir
from tests.small import small_config


def test_what_is_neither_begin_nor_steps_is_the_rest(tmp_path):
  config = small_config()
  cell = Cell("small", "small.py:cell", "cell", config, None)
  run = RunDir.of(tmp_path, cell)
  write_json(run.launch, {"started": 100.0, "ended": 110.0})
  run.write_status({"state": "finished", "started": 101.5, "tokens_per_second": 7.0})
  # Two steps in two seconds, then three in one.
  speeds = {2: config.batch_tokens, 5: 3 * config.batch_tokens}
  write_text(run.metrics_file(1, 2), "".join(
      json.dumps({"step": step, "tokens_per_second": speed}) + "\n"
      for step, speed in speeds.items()))
  assert grid.of_cell(cell, tmp_path) == pytest.approx(
      {"begin": 1.5, "steps": 3.0, "rest": 5.5, "whole": 10.0, "tokens_per_second": 7.0})


def test_a_branch_did_not_do_its_trunks_steps(tmp_path):
  config = override(small_config(), {"train.steps": 10, "train.branch_from": "trunk@6"})
  cell = Cell("small", "small.py:cell", "cell", config, None)
  run = RunDir.of(tmp_path, cell)
  write_json(run.launch, {"started": 100.0, "ended": 110.0})
  run.write_status({"state": "finished", "started": 101.0, "tokens_per_second": 7.0})
  write_text(run.metrics_file(1, 7), json.dumps(
      {"step": 10, "tokens_per_second": config.batch_tokens}) + "\n")
  assert grid.of_cell(cell, tmp_path)["steps"] == pytest.approx(4.0)
