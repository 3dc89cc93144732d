"""The estimate of the study's time is that of its runs' tokens."""

import pytest

from benchmarks import study_speed
from experiments.study import arms

SPEEDS = {(size, together): 1e6 for size in (arms.SIZES[0], arms.SIZES[-1])
          for together in (1, study_speed.TOGETHER)}


def test_at_equal_speeds_minutes_are_tokens():
  tokens = arms.RECIPE.train.steps * arms.RECIPE.batch_tokens
  assert study_speed.minutes("pilots", SPEEDS) == pytest.approx(32 * tokens / 1e6 / 60)
  assert study_speed.minutes("large", SPEEDS) == pytest.approx(16 * 1.15 * tokens / 1e6 / 60,
                                                               rel=1e-3)
  faster = SPEEDS | {(arms.SIZES[0], study_speed.TOGETHER): 4e6}
  assert study_speed.minutes("pilots", faster) < 0.65 * study_speed.minutes("pilots", SPEEDS)
