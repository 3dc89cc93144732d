"""A profile covers the steps that were asked for, and bad ones are refused before anything."""

import pathlib

import jax
import jax.numpy as jnp
import pytest

from moe_jax.train import profile as profile_lib
from moe_jax.train.profile import Profile
from tests.experiment_files import BASE, run_module, write_tiny


def traced(run_dir):
  return list(pathlib.Path(run_dir.profile).glob("plugins/profile/*/*.xplane.pb"))


def do_steps(run_dir, steps, first, last, seen=None):
  step_fn = jax.jit(lambda x: x @ x)
  with Profile(run_dir, steps) as profile:
    for step in range(first, last + 1):
      profile.begin(step)
      result = step_fn(jnp.ones((8, 8)))
      profile.end(step, result)
      if seen is not None:
        seen.append((step, bool(traced(run_dir))))


def test_the_trace_is_there_as_soon_as_the_last_of_the_steps_is_done(run_dir):
  seen = []
  do_steps(run_dir, (2, 3), 1, 5, seen)
  assert seen == [(1, False), (2, False), (3, True), (4, True), (5, True)]
  assert len(traced(run_dir)) == 1


def test_a_run_that_ends_among_the_steps_still_leaves_them(run_dir):
  do_steps(run_dir, (4, 90), 1, 5)
  assert len(traced(run_dir)) == 1


def test_a_trace_ends_when_its_last_step_is_passed_over(run_dir):
  """As when the member whose steps were counted diverges, and another's count is ahead."""
  with Profile(run_dir, (2, 3)) as profile:
    for step in (2, 5):
      profile.begin(step)
      profile.end(step, jnp.ones(8) + 1)
    assert len(traced(run_dir)) == 1


def test_a_run_resumed_behind_the_steps_says_that_there_is_no_profile(run_dir, caplog):
  do_steps(run_dir, (2, 3), 7, 8)
  assert not run_dir.profile.exists()
  assert "no profile: this attempt did none of the steps 2 to 3" in caplog.text


def test_nothing_is_traced_unasked(run_dir, caplog):
  do_steps(run_dir, None, 1, 3)
  assert not run_dir.profile.exists() and not caplog.records


def test_an_object_store_gets_a_copy(run_dir, monkeypatch):
  monkeypatch.setattr(profile_lib, "is_local", lambda path: False)
  do_steps(run_dir, (1, 1), 1, 1)
  assert len(traced(run_dir)) == 1


@pytest.mark.parametrize("value", ["10", "3:2", "0:2", "5:21", "a:b", "-1:2", "1:2:3", ""])
def test_bad_steps_are_refused_in_one_line(tmp_path, value):
  spec = write_tiny(tmp_path, steps=20)
  done = run_module("-m", "moe_jax.train", f"--config={spec}:{BASE}", f"--profile_steps={value}",
                    f"--out={tmp_path / 'runs'}")
  assert done.returncode == 2
  assert done.stderr == (f"error: --profile_steps={value!r}: must be FIRST:LAST, two steps from 1 "
                         "to 20\n")
  assert not (tmp_path / "runs").exists()


def test_the_shortest_of_several_cells_decides_what_steps_there_are(tmp_path):
  """Whichever of them is not finished is the one that is profiled."""
  whole = "l4-d96-f198-e8-k2-steps1953-decay0"
  done = run_module("-m", "moe_jax.train", "--config=experiments/study/rehearsal_tenth.py:"
                    f"{whole},l4-d96-f198-e8-k2-steps610-branch488", "--profile_steps=700:701",
                    f"--out={tmp_path / 'runs'}")
  assert done.returncode == 2
  assert "--profile_steps='700:701': must be FIRST:LAST, two steps from 1 to 610" in done.stderr
