"""The estimate of the study's time is that of its runs' tokens."""

import pytest

from benchmarks import study_speed
from experiments.study import arms
from moe_jax.errors import FieldError
from tests.experiment_files import run_module

SPEEDS = {(size, together): 1e6 for size in (arms.SIZES[0], arms.SIZES[-1])
          for together in (1, study_speed.TOGETHER)}


def test_at_equal_speeds_minutes_are_tokens():
  def total(grid, known):
    return sum(study_speed.minutes(grid, known).values())

  run = arms.RECIPE.train.steps * arms.RECIPE.batch_tokens / 1e6 / 60
  assert total("pilots", SPEEDS) == pytest.approx(32 * run)
  assert total("large", SPEEDS) == pytest.approx(16 * 1.15 * run, rel=1e-3)
  faster = SPEEDS | {(arms.SIZES[0], study_speed.TOGETHER): 4e6}
  assert total("pilots", faster) < 0.65 * total("pilots", SPEEDS)
  assert sorted(study_speed.minutes("pilots", SPEEDS).values()) == pytest.approx(
      [3 * run] * 4 + [5 * run] * 4)  # a sweep is a unit


def test_speeds_are_those_of_what_will_run(monkeypatch, capsys):
  asked = []

  def measure(config, sizes, steps, passes):
    asked.append(config.execution.remat)
    return [{"population": 1, "error": "out of memory"}, {
        "population": 3, "step_ms": 1.0, "tokens_per_second": 2e6, "compile_seconds": 1.0}]

  monkeypatch.setattr(study_speed, "measure", measure)
  with pytest.raises(FieldError, match="remat='rows': lets no run of size 2000000 fit"):
    study_speed.speeds(1, ["--config.execution.remat=rows"])
  assert asked == ["rows"] * 2 and "out of memory" in capsys.readouterr().out


def test_what_is_trained_cannot_be_changed():
  done = run_module("-m", "benchmarks.study_speed", "--config.train.steps=7")
  assert done.returncode == 2 and "would change what is trained" in done.stderr
