"""JobSets: applied once, made anew where cells are left, and nothing where that is not allowed."""

import json

import pytest

from launch.backends import gke
from launch.code import Code
from launch.jobs import jobs_of
from launch.remote import Answer
from moe_jax.grid import select
from tests.experiment_files import write_tiny

_CODE = Code("c", "a" * 64, "e.py", b"")


class _Kubectl:
  """Attributes: there (JobSet -> terminal state or ""), told (verbs), may (create)."""

  def __init__(self):
    self.there, self.told, self.may = {}, [], True

  def __call__(self, command):
    verb, *rest = command[2:]
    if verb == "auth":
      return Answer(0 if self.may else 1, "yes" if self.may else "no", "")
    if verb == "get":
      assert rest[0] == "jobset"
      name = rest[1]
      return Answer(0, f"{name} {self.there[name]}" if name in self.there else "", "")
    self.told.append(verb)
    if verb == "delete":
      del self.there[rest[1]]
    else:
      with open(rest[0].removeprefix("--filename=")) as file:
        self.there[json.load(file)["metadata"]["name"]] = ""
    return Answer(0, "", "")


@pytest.fixture
def submit(tmp_path):
  out, options, kubectl = str(tmp_path / "runs"), gke.Options("v6e-8", "i:1", slices=2), _Kubectl()
  jobs = jobs_of(select(write_tiny(tmp_path)), out, [])

  def run():
    return gke.submit(gke.plan(jobs, options, _CODE, out), jobs, options, _CODE, out, kubectl)

  return run, kubectl, jobs


def test_it_is_applied_once(submit, capsys):
  run, kubectl, _ = submit
  assert run() == 0 and kubectl.told == ["apply", "apply"]
  assert run() == 0 and kubectl.told == ["apply", "apply"]
  assert capsys.readouterr().out.count("already exists") == 2


def test_one_that_has_ended_with_cells_left_is_made_anew(submit, capsys):
  run, kubectl, jobs = submit
  run()
  kubectl.there = dict.fromkeys(kubectl.there, "Completed")
  jobs[0].run_dir.claim(jobs[0].cell)
  jobs[0].run_dir.write_status({"state": "finished", "step": 20, "steps": 20})
  assert run() == 0 and kubectl.told == ["apply", "apply", "delete", "apply"]
  said = capsys.readouterr().out
  assert "is done" in said and "has ended (Completed) with unfinished cells; recreating it" in said


def test_without_the_permission_nothing_is_written_or_applied(submit, capsys, tmp_path):
  run, kubectl, _ = submit
  kubectl.may = False
  assert run() == 1 and kubectl.told == []
  assert "nothing was applied: kubectl may not create JobSets in namespace default: " in (
      capsys.readouterr().out)
  assert not (tmp_path / "runs" / "tiny").exists()
