"""A run that begins with the parameters of another of its grid: it waits until they are saved."""

import json

import pytest

from launch.code import Code
from launch.jobs import Launch, jobs_of, read_launch, require_sources, write_launch
from launch.shares import deal
from launch.state import states_of
from launch.work import from_text, to_text, why_ended, work_of
from moe_jax.config import to_dict
from moe_jax.errors import FieldError
from moe_jax.files import write_json
from moe_jax.grid import select
from moe_jax.run_dir import RunDir
from tests.experiment_files import run_module, write
from tests.launch.local_test import _submit

# What begins with the dense run is listed first: it must wait all the same.
SOURCE = '''
from moe_jax.config import *
from moe_jax.fields import override
from moe_jax.grid import Grid, cell_name

RECIPE = RunConfig(
    arch=Architecture(n_layers=1, d_model=16, d_expert=16, n_exp=1, n_topk=1, n_heads=2),
    train=TrainConfig(steps=20, warmup_steps=2),
    execution=ExecutionConfig(checkpoint_every=5, keep_steps=(10,)))
DENSE = f"up/{cell_name(RECIPE, RECIPE)}"
UPCYCLED = {"arch.n_exp": 4, "arch.n_topk": 2}


def get_grid():
  return Grid("up", RECIPE, (
      override(RECIPE, UPCYCLED | {"train.init_from": DENSE}),
      override(RECIPE, UPCYCLED | {"train.init_from": f"{DENSE}@10"}), RECIPE))
'''


@pytest.fixture
def spec(tmp_path):
  return write(tmp_path, SOURCE, "up.py")


def _launches(spec, out):
  return [read_launch(RunDir.of(out, cell)) for cell in select(spec)]


def test_a_run_comes_before_what_begins_with_its_parameters(spec, tmp_path):
  """Chains of them too."""
  third = select(spec)[0].name
  spec = write(tmp_path, SOURCE.replace('''  return Grid("up", RECIPE, (
''', f'''  return Grid("up", RECIPE, (
      override(RECIPE, UPCYCLED | {{"seed_init": 7, "train.init_from": "up/{third}"}}),
'''), "up.py")
  jobs = jobs_of(select(spec), tmp_path, [])
  assert [job.cell.config.train.init_run for job in jobs] == [
      None, f"up/{jobs[0].name}", f"up/{jobs[0].name}", f"up/{third}"]


@pytest.mark.parametrize("parallel", [1, 3])
def test_it_waits_for_that_step_or_for_the_end(spec, tmp_path, parallel):
  out = tmp_path / "runs"
  assert _submit(spec, out, ["ok", "ok", "slow"], parallel) == 0
  last, tenth, dense = _launches(spec, out)
  assert dense.started < tenth.started
  assert last.started > RunDir.of(out, select(spec)[2]).read_status()["heartbeat"]
  if parallel == 3:  # the dense run takes half a second more behind its step 10
    assert tenth.started < dense.ended


def test_where_the_first_ends_without_they_are_not_started(spec, tmp_path, capsys):
  out = tmp_path / "runs"
  assert _submit(spec, out, ["ok", "ok", "crash"], 3) == 1
  assert [row.state for row in states_of(out, select(spec))] == ["pending", "pending", "failed"]
  said = capsys.readouterr().out
  dense = select(spec)[2].name
  for step in ("its last step", "step 10"):
    assert f"not started: its source {dense} ended before it saved {step}" in said
  assert _submit(spec, out, ["ok", "ok", "ok"], 3) == 0


def test_on_a_slice_they_are_given_up_where_the_first_is(spec, tmp_path):
  (share,) = deal(jobs_of(select(spec), str(tmp_path), []), 1)
  todo = work_of(share, Code("c", "a" * 64, "e.py", b""), str(tmp_path), "test")
  todo = from_text(to_text(todo), "work.json")
  dense, last, tenth = todo.cells
  assert todo.sources == {last: (dense, None), tenth: (dense, 10)}
  assert [why_ended(todo, name) for name in todo.cells] == [None] * 3

  def end(state, failures):
    write_launch(todo.run_dir(dense), Launch("test", ("python",), 1, "host", 1, 0.0, ended=1.0,
                                             state=state, failures=failures))

  end("failed", todo.max_failures - 1)  # it is tried once more
  assert [why_ended(todo, name) for name in todo.cells] == [None] * 3
  end("failed", todo.max_failures)
  assert why_ended(todo, last) == f"given up: its source {dense} did not finish"
  assert why_ended(todo, tenth) == (
      f"given up: its source {dense} ended before it saved step 10")
  (todo.run_dir(dense).checkpoints / "10").mkdir(parents=True)
  assert why_ended(todo, tenth) is None
  (todo.run_dir(last).checkpoints / "5").mkdir(parents=True)
  assert why_ended(todo, last) is None  # it has begun, and needs the other no more


def test_one_under_way_needs_the_other_no_more(spec, tmp_path):
  dense, last, tenth = jobs_of(select(spec), tmp_path, [])
  for job in (last, tenth):
    assert job.missing_source() == dense.run_dir
    (job.run_dir.checkpoints / "5").mkdir(parents=True)
    assert job.missing_source() is None
  assert dense.missing_source() is None


def test_a_damaged_status_is_no_end(spec, tmp_path):
  dense, last, tenth = jobs_of(select(spec), tmp_path, [])
  (dense.run_dir.checkpoints / "10").mkdir(parents=True)
  (dense.run_dir.path / "status.json").write_text('{"state": "fini')
  assert (last.missing_source(), tenth.missing_source()) == (dense.run_dir, None)


def test_one_that_would_wait_for_itself_is_refused(tmp_path):
  """A recipe's own `init_from` is in no name: so a run can be its own."""
  spec = write(tmp_path, SOURCE.partition("UPCYCLED =")[0] + '''
RECIPE = override(RECIPE, {"train.init_from": DENSE})


def get_grid():
  return Grid("up", RECIPE, (RECIPE,))
''', "up.py")
  jobs = jobs_of(select(spec), tmp_path / "runs", [])
  with pytest.raises(FieldError, match=r"init_from='up/.*': makes l1-.* wait for itself"):
    require_sources(jobs)
  with pytest.raises(FieldError, match="has a cell that begins, directly or through other cells"):
    select(spec, {"train.learning_rate": 5e-3})


def test_one_that_began_from_another_run_of_that_name_is_not_taken_for_it(spec, tmp_path):
  (dense,) = [cell for cell in select(spec) if cell.config.train.init_from is None]
  there = RunDir.of(tmp_path / "b", dense)
  there.claim(dense)
  (cell,) = select(f"{spec}:{select(spec)[0].name}",
                   {"train.init_from": f"{there.path}@10"})
  (job,) = jobs_of([cell], tmp_path / "runs", [])
  ours = {"run": f"up/{dense.name}", "step": 10, "checkpoint": "0"}
  for identity, same in ((there.read_identity(), True), (12 * "0", False)):
    write_json(job.run_dir.path / "config.json", {
        "identity": "", "config": to_dict(cell.config),
        "began_from": ours | {"identity": identity}})
    job.run_dir.write_status({"state": "finished", "step": 20, "steps": 20})
    assert job.is_finished() == same


def _command(spec, out, *arguments):
  return run_module("-m", "launch.submit", f"--config={spec}", f"--out={out}", *arguments)


@pytest.mark.parametrize("dry_run", [(), ("--dry_run",), ("--dry_run=json",)])
def test_what_is_neither_there_nor_submitted_is_refused_in_one_line(spec, tmp_path, dry_run):
  """Before the trainers start, each of which would say so; and where nothing would be run, no
  command is printed."""
  out = tmp_path / "runs"
  last = select(spec)[0].name
  done = _command(f"{spec}:{last}", out, *dry_run)
  assert (done.returncode, done.stdout) == (2, "")
  dense = select(spec)[2].name
  assert done.stderr == (
      f"error: --config.train.init_from='up/{dense}': is the source of {last}, but that "
      "checkpoint does not exist and the run is not part of this submission\n")
  assert not out.exists()


def test_a_trunk_that_is_nowhere_is_refused_for_the_whole_grid(tmp_path):
  """An override gives all cells the trunk of one, also those of other architectures."""
  trunk = select("experiments/quickstart.py")[0].name
  branch = f"--config.train.branch_from={trunk}@100"
  for dry_run in (("--dry_run",), ()):
    done = _command("experiments/quickstart.py", tmp_path / "runs", *dry_run, branch)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"error: --config='{trunk}-branch100': branches from quickstart/{trunk}, which has not "
        "saved step 100 and is not part of this submission\n")
  assert not (tmp_path / "runs").exists()


def test_a_trunk_of_another_architecture_is_refused_for_the_whole_grid(tmp_path):
  cells = select("experiments/quickstart.py")
  run_dir = RunDir.of(tmp_path / "runs", cells[0])
  run_dir.claim(cells[0])
  (run_dir.checkpoints / "100").mkdir(parents=True)
  branch = f"--config.train.branch_from={cells[0].name}@100"
  done = _command("experiments/quickstart.py", tmp_path / "runs", "--dry_run=json", branch)
  assert (done.returncode, done.stdout) == (2, "")
  assert done.stderr.startswith(f"error: --config='{cells[1].name}-branch100': train.branch_from=")
  assert "the trunk differs in more than its steps and its decay: arch." in done.stderr
  assert done.stderr.count("\n") == 1
  one = f"experiments/quickstart.py:{cells[0].name}"
  done = _command(one, tmp_path / "runs", "--dry_run=json", branch)
  assert (done.returncode, len(json.loads(done.stdout)["commands"])) == (0, 1)


def test_what_is_finished_needs_nothing_any_more(tmp_path):
  """Checkpoints of finished runs may be deleted, those of trunks and sources too."""
  (cell,) = select("experiments/quickstart.py:l2-d108-f58-e16-k8", {
      "train.branch_from": "l2-d108-f58-e16-k8@100"})
  (job,) = jobs_of([cell], tmp_path, [])
  with pytest.raises(FieldError, match="has not saved step 100"):
    require_sources([job])
  job.run_dir.claim(cell)
  job.run_dir.write_status({"state": "finished", "step": 300, "steps": 300})
  require_sources([job])
