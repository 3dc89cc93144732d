"""`launch.submit` for other machines, as typed: the plan, the refusals, and no secret anywhere."""

import json
import shutil
import time

import pytest

from launch.backends import gcloud, gke, slurm
from launch.code import Code
from launch.jobs import jobs_of
from launch.plans import to_json
from launch.remote import Answer
from moe_jax.grid import select
from tests.experiment_files import BASE, run_module, write, write_tiny

_BACKENDS = {
    "gcloud": ["--project=p", "--zones=us-east5-b,europe-west4-a", "--topology=v6e-8"],
    "gke": ["--topology=tpu7x-8", "--image=r.pkg.dev/p/r/moe-jax:1", "--queue=tpus"],
    "slurm": ["--gpus_per_node=8", "--partition=gpu"]}
_SECRET = "hunter2-do-not-print"


@pytest.fixture
def spec(tmp_path):
  return write_tiny(tmp_path, seeds=4)


def _submit(backend, spec, tmp_path, *arguments, options=None, **environment):
  return run_module("-m", "launch.submit", f"--config={spec}", f"--backend={backend}",
                    f"--out={tmp_path / 'runs'}", *(_BACKENDS[backend] if options is None
                                                    else options), *arguments, **environment)


@pytest.mark.parametrize("backend", _BACKENDS)
def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path, spec, backend):
  done = _submit(backend, spec, tmp_path, "--slices=2", "--dry_run", "--config.seed_data=3",
                 MY_TOKEN=_SECRET)
  assert (done.returncode, done.stderr) == (0, "")
  assert "code " in done.stdout and "every machine must see the same directory" in done.stdout
  plan = json.loads(_submit(backend, spec, tmp_path, "--slices=2", "--dry_run=json",
                            "--config.seed_data=3", MY_TOKEN=_SECRET).stdout)
  assert plan["backend"] == backend
  cells = [cell for share in plan["slices"] for cell in share["cells"]]
  assert len(cells) == 4 and f"{BASE}-s1-sd3" in cells
  for file in (file for share in plan["slices"] for file in share["files"]):
    assert _SECRET not in file["text"] and "MY_TOKEN" not in file["text"]
    if file["path"].endswith("work.json"):
      for command in json.loads(file["text"])["cells"].values():
        assert command[:3] == ["python", "-m", "moe_jax.train"]
        assert command[3].startswith("--config=_submitted/tiny.py:")
        assert command[4:] == [f"--out={tmp_path / 'runs'}", "--config.seed_data=3"]
  assert _SECRET not in done.stdout
  assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("backend, arguments, message", [
    ("gcloud", [], "--project='': is required by --backend=gcloud"),
    ("gcloud", ["--project=p", "--topology=v6e-16"], "--zones='': is required"),
    ("gcloud", ["--project=$(reboot)", "--zones=us-east5-b", "--topology=v6e-8"],
     "--project='$(reboot)': must be letters"),
    ("gcloud", ["--project=--impersonate", "--zones=us-east5-b", "--topology=v6e-8"],
     "--project='--impersonate': must be"),
    ("gcloud", ["--project=p", "--zones=us-east5", "--topology=v6e-8"],
     "--zones='us-east5': must be zones such as us-east5-b"),
    ("gcloud", ["--project=p", "--zones=us-east5-b", "--topology=tpu7x-64"],
     "is not available as a queued resource; use --backend=gke"),
    ("gcloud", ["--project=p", "--zones=us-east5-b", "--topology=v6e-12"],
     "not in the table of slices; the nearest are v6e-8 and v6e-16"),
    ("gcloud", ["--project=p", "--zones=us-east5-b", "--topology=v6e-8", "--slices=0"],
     "--slices=0: must be at least 1"),
    ("gcloud", ["--project=p", "--zones=us-east5-b", "--topology=v6e-8", "--capacity=free"],
     "--capacity='free': must be 'spot' or"),
    ("gcloud", ["--project=p", "--zones=us-east5-b", "--topology=v6e-8", "--queue=x"],
     "--queue='x': is not an option of --backend=gcloud, which has --project"),
    ("gcloud", [*_BACKENDS["gcloud"], "--parallel=2"], "is an option of --backend=local only"),
    ("gke", ["--topology=v6e-16"], "--image='': is required by --backend=gke"),
    ("gke", [*_BACKENDS["gke"], "--capacity=reserved"], "must be given with --capacity=reserved"),
    ("gke", [*_BACKENDS["gke"], "--namespace=a;b"], "--namespace='a;b': must be letters"),
    ("slurm", ["--time=soon"], "--time='soon': must be MINUTES"),
    ("slurm", ["--tasks_per_node=2"], "--gpus_per_node=0: each GPU has one process"),
    ("slurm", ["--out=gs://bucket/runs"], "must be a directory that all nodes see"),
    ("slurm", ["--out=/runs/a b"], "must be letters, digits"),
    ("local", ["--topology=v6e-8"], "--topology='v6e-8': is not an option of --backend=local"),
])
def test_bad_input_is_one_line_and_nothing_is_created(tmp_path, spec, backend, arguments, message):
  done = run_module("-m", "launch.submit", f"--config={spec}", f"--backend={backend}",
                    f"--out={tmp_path / 'runs'}", *arguments, "--dry_run")
  assert done.returncode == 2
  assert message in done.stderr
  assert done.stderr.count("\n") == 1
  assert done.stdout == ""
  assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("where", [_SECRET, f"TOKEN={_SECRET}", "TOKEN=$(cat /etc/passwd)"])
def test_a_secret_itself_is_refused_and_not_repeated(tmp_path, spec, where):
  done = _submit("gcloud", spec, tmp_path, f"--secrets={where}", "--dry_run")
  assert done.returncode == 2
  assert "never the secret itself" in done.stderr
  assert _SECRET not in done.stderr + done.stdout


def test_an_experiment_that_raises_is_one_line(tmp_path):
  spec = write(tmp_path, "raise OSError('no grid today')\n", "broken.py")
  done = _submit("gcloud", spec, tmp_path, "--dry_run")
  assert done.returncode == 2
  assert "raises at broken.py:1: OSError: no grid today" in done.stderr
  assert done.stderr.count("\n") == 1


def test_without_the_tool_nothing_is_asked_for(tmp_path, spec):
  folder = tmp_path / "bin"
  folder.mkdir()
  (folder / "git").symlink_to(shutil.which("git"))
  done = _submit("slurm", spec, tmp_path, PATH=str(folder))
  assert done.returncode == 2
  assert "--backend='squeue': is not on PATH" in done.stderr


@pytest.mark.parametrize("backend, module, options", [
    ("gke", gke, gke.Options("v6e-8", "i:1")), ("slurm", slurm, slurm.Options())])
def test_where_nothing_can_be_written_nothing_is_submitted(tmp_path, spec, capsys, backend, module,
                                                           options):
  (tmp_path / "file").touch()
  out, asked = str(tmp_path / "file" / "runs"), []
  jobs, code = jobs_of(select(spec), out, []), Code("c", "a" * 64, "e.py", b"")

  def run(command):
    asked.append(command[0])
    return Answer(0, "", "")

  assert module.submit(module.plan(jobs, options, code, out), jobs, options, code, out, run) == 1
  assert f"cannot write to --out={out}: " in capsys.readouterr().out
  assert "sbatch" not in asked and "kubectl" not in asked


def test_the_same_command_gives_the_same_plan(tmp_path, spec):
  first, second = (json.loads(_submit("gcloud", spec, tmp_path, "--dry_run=json").stdout)
                   for _ in range(2))
  for plan in (first, second):  # the code may be edited meanwhile: code_test.py has its part
    del plan["notes"]
    for share in plan["slices"]:
      share["files"] = [file["path"] for file in share["files"]]
  assert first == second


def test_a_dry_run_on_a_bucket_prints_lines_that_a_shell_can_run(tmp_path, spec):
  """gcloud and kubectl read files, not objects."""
  done = run_module("-m", "launch.submit", f"--config={spec}", "--backend=gke",
                    "--out=gs://bucket/runs", *_BACKENDS["gke"], "--dry_run")
  assert (done.returncode, done.stderr) == (0, "")  # whether or not gcsfs is there
  assert "python -m moe_jax.plan" in done.stdout and "--out=runs" in done.stdout
  *_, line = done.stdout.splitlines()
  assert line.startswith("kubectl --namespace=default apply --filename=_slices/tiny-0-")
  assert "# below, _slices is a copy of gs://bucket/runs/tiny/_slices in the current folder" in (
      done.stdout)


def test_a_thousand_cells_are_planned_with_little_text(tmp_path):
  """No time is asserted; a plan that grew with the square of the cells would show here."""
  jobs = jobs_of(select(write_tiny(tmp_path, seeds=1000)), "gs://b/runs", [])
  options = gcloud.Options("p", ("us-east5-b",), "v6e-8", slices=100)
  started = time.monotonic()
  text = to_json(gcloud.plan(jobs, options, Code("c", "a" * 64, "e.py", b""), "gs://b/runs"))
  print(f"{time.monotonic() - started:.2f} s")
  assert len(json.loads(text)["slices"]) == 100
  assert len(text) < 2e6
