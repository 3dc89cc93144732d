"""A trainer whose runs are on a bucket: what gcsfs raises is no OSError, and no end of a run."""

import time
import types

import pytest

from moe_jax import run_dir as run_dir_lib
from moe_jax.train import loop
from tests.experiment_files import run_module


@pytest.mark.parametrize("error", [
    type("HttpError", (Exception,), {"__module__": "gcsfs.retry"}), TypeError])
def test_what_goes_wrong_for_once_does_not_end_the_heartbeat(error, run_dir, monkeypatch, caplog):
  """What gcsfs raises is no OSError, and whatever else it is: a run that fell silent would be
  taken for dead, and its directory given to another trainer."""
  monkeypatch.setattr(run_dir_lib, "HEARTBEAT_SECONDS", 0.01)
  member, beats = types.SimpleNamespace(run_dir=run_dir), []

  def beat():
    beats.append(None)
    if 2 <= len(beats) <= 4:
      raise error("try again\nlater")

  member.beat = beat
  with caplog.at_level("WARNING", "absl"), loop._heartbeat([member]):
    deadline = time.monotonic() + 10
    while len(beats) < 8 and time.monotonic() < deadline:
      time.sleep(0.01)
  assert len(beats) >= 8
  assert caplog.text.count("'s heartbeat cannot be written: try again later") == 1


def test_an_error_of_a_bucket_is_one_line():
  """As one of a disk: what gcsfs raises is no OSError."""
  done = run_module("-c", """
from moe_jax.train.__main__ import _ending
print(_ending(type("HttpError", (Exception,), {"__module__": "gcsfs.retry"})("try\\nagain")),
      _ending(ValueError("ours")))""")
  assert done.stdout == ("(1, 'try again; checkpoints are kept; run the same command to resume') "
                         "None\n"), done.stderr
