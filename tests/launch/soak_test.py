"""A few of the soak's random timelines; `python -m tests.launch.soak` plays a thousand."""

import pytest

from tests.launch import soak


@pytest.mark.parametrize("seed", range(8))
def test_nothing_is_left_behind(tmp_path, seed):
  assert soak.play(seed, tmp_path) in ("done", "given up")
