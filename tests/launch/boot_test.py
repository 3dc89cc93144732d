"""How machines get the code: the image's boot.py, the TPU VM's start-up script and the script of
SLURM's array, really run."""

import gzip
import os
import subprocess
import sys
import time

import pytest
from etils import epath

from launch import budget
from launch.backends import gcloud, slurm
from launch.code import pack
from launch.host.agent import Agent, Pace
from launch.work import from_text
from tests.experiment_files import ROOT
from tests.launch.agent_test import _here, _work

_BOOT = ROOT / "launch" / "host" / "boot.py"


@pytest.fixture(scope="module")
def code(tmp_path_factory):
  """This repository, with a stand-in for the agent that says where it runs."""
  checkout = tmp_path_factory.mktemp("checkout")
  (checkout / "launch").mkdir()
  for name in ("__init__.py", "host.py"):
    (checkout / "launch" / name).write_text(
        "import os, sys; print('agent', sys.argv[1:], os.path.exists('code.json'))\n"
        "log = open(os.environ['SEEN'], 'a'); print(*sys.argv[1:], file=log); log.close()\n"
        "sys.exit(1 if len(open(os.environ['SEEN']).readlines()) < 2 else 0)\n"
        if name == "host.py" else "")
  for command in (["init", "--quiet"], ["add", "."],
                  ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "x"]):
    subprocess.run(["git", *command], cwd=checkout, check=True)
  return pack(str(checkout / "launch" / "host.py"), checkout)


@pytest.fixture
def out(tmp_path, code):
  (tmp_path / "out" / "_code").mkdir(parents=True)
  (tmp_path / "out" / "_code" / code.file_name).write_bytes(code.archive)
  return tmp_path / "out"


def _boot(out, code, sha256):
  return subprocess.run(
      [sys.executable, str(_BOOT), f"--code={out}/_code/{code.file_name}", f"--sha256={sha256}",
       "--", "-m", "launch.host", "--work=w"], capture_output=True, text=True, timeout=60,
      env={**os.environ, "SEEN": str(out / "seen")})


def test_the_image_runs_exactly_the_code_that_was_submitted(out, code):
  assert "agent ['--work=w'] True" in _boot(out, code, code.sha256).stdout
  done = _boot(out, code, "0" * 64)
  assert done.returncode == 1
  assert "it was changed or truncated" in done.stderr


def _startup(tmp_path, out, code, **options):
  """Runs the script as a booting TPU VM would; its `gcloud` only says what it was told."""
  tools = tmp_path / "tools"
  tools.mkdir(exist_ok=True)
  (tools / "gcloud").write_text(f'#!/bin/bash\nprintf "%s\\n" "$@" > {tmp_path}/deleted\n')
  (tools / "gcloud").chmod(0o755)
  options = gcloud.Options("p", ("us-east5-b",), "v6e-8", **{
      "python": sys.executable, **options})
  text = gcloud.startup_script("s0", options, code, str(out), "e x", "us-east5-b")
  return subprocess.run(
      ["bash"], input=text, text=True, timeout=60, cwd="/",
      env={"PATH": f"{tools}:{os.environ['PATH']}", "MOE_JAX_HOME": str(tmp_path / "home"),
           "MOE_JAX_PAUSE": "0.1", "SEEN": str(tmp_path / "seen")})


def test_the_start_up_script_goes_on_until_the_agent_is_done_then_deletes(tmp_path, out, code):
  assert _startup(tmp_path, out, code).returncode == 0
  assert (tmp_path / "seen").read_text() == f"--work={out}/e x/_slices/s0/work.json\n" * 2
  assert (tmp_path / "deleted").read_text().split() == list(
      gcloud.delete("s0", gcloud.Options("p", ("us-east5-b",), "v6e-8"), "us-east5-b")[1:])
  assert "ended with exit code 1; retrying in 0.1 s" in (tmp_path / "home" / "log.txt").read_text()
  assert _startup(tmp_path, out, code).returncode == 0  # a reboot
  assert len((tmp_path / "seen").read_text().splitlines()) == 3


def test_it_deletes_nothing_unless_told_to(tmp_path, out, code):
  (tmp_path / "seen").write_text("before\n")
  assert _startup(tmp_path, out, code, delete_when_done=False).returncode == 0
  assert not (tmp_path / "deleted").exists()


_DEAR = 450.0  # US dollars a chip-hour: the slice's eight chips cost one a second


@pytest.mark.parametrize("slices, usd", [(1, 202.5), (4, 810.0)])
def test_a_machine_on_which_nothing_begins_ends_its_slice_for_its_share(tmp_path, out, code,
                                                                       slices, usd):
  """The margin of 200 s is kept for saving; no agent has counted anything."""
  (out / "_code" / code.file_name).write_bytes(code.archive[:-1] + b"?")
  began = time.monotonic()
  assert _startup(tmp_path, out, code, slices=slices, max_cost_usd=usd,
                  usd_per_chip_hour=_DEAR).returncode == 0
  assert 1 < time.monotonic() - began < 20
  log = (tmp_path / "home" / "log.txt").read_text()
  assert log.count("FAILED") > 1 and log.endswith(
      "spending would exceed --max_cost_usd: ending the slice\n")
  assert (tmp_path / "deleted").exists() and not (tmp_path / "seen").exists()


def test_the_limit_may_be_raised_and_an_agent_that_counts_is_left_alone(tmp_path, out, code):
  dear = {"max_cost_usd": 300.0, "usd_per_chip_hour": _DEAR, "slices": 4}
  _startup(tmp_path, out, code, **dear)
  assert not (tmp_path / "seen").exists()  # a share of 75 seconds is less than the margin
  (tmp_path / "home" / "at_work").touch()
  _startup(tmp_path, out, code, **dear)
  assert len((tmp_path / "seen").read_text().splitlines()) == 2
  (tmp_path / "home" / "at_work").unlink()
  budget.set_limit(epath.Path(out / "e x" / "_slices"), 4e6)
  _startup(tmp_path, out, code, **dear)
  assert len((tmp_path / "seen").read_text().splitlines()) == 3
  budget.set_limit(epath.Path(out / "e x" / "_slices"), None)
  _startup(tmp_path, out, code, **dear)
  assert len((tmp_path / "seen").read_text().splitlines()) == 4


def test_an_agent_that_does_not_end_is_told_to_save(tmp_path, out, code):
  """Its own account may fail, too."""
  python = tmp_path / "python"
  python.write_text(f"#!/bin/bash\ntrap 'echo saved > {tmp_path}/saved; exit 75' TERM\n"
                    "while :; do sleep 0.1; done\n")
  python.chmod(0o755)
  _startup(tmp_path, out, code, python=str(python), max_cost_usd=203.0, usd_per_chip_hour=_DEAR)
  assert (tmp_path / "saved").exists() and (tmp_path / "deleted").exists()


def test_an_agent_says_when_it_begins(tmp_path, monkeypatch):
  """Not on a machine that is of no use, where it would end and be begun again for ever."""
  monkeypatch.setenv("MOE_JAX_AT_WORK", str(tmp_path / "at_work"))
  file = _work(tmp_path, ["ok"])
  todo = from_text(file.read_text(), file)
  for trouble, began in (("a chip is held", False), (None, True)):
    _here(Agent(todo, epath.Path(file.parent), "0-0", Pace(0.02, 0.02), trouble=[trouble].pop))
    assert (tmp_path / "at_work").exists() == began


def test_code_that_was_changed_is_not_run(tmp_path, out, code):
  (out / "_code" / code.file_name).write_bytes(code.archive[:-1] + b"?")
  text = gcloud.startup_script("s0", gcloud.Options("p", ("us-east5-b",), "v6e-8",
                                                    python=sys.executable), code, str(out), "e",
                               "us-east5-b")
  (tmp_path / "startup.sh").write_text(text)
  script = subprocess.Popen(
      ["bash", str(tmp_path / "startup.sh")], cwd="/",
      env={"PATH": os.environ["PATH"], "MOE_JAX_HOME": str(tmp_path / "home"),
           "MOE_JAX_PAUSE": "0.1", "SEEN": str(tmp_path / "seen")})
  log, deadline = tmp_path / "home" / "log.txt", time.monotonic() + 60
  while not log.exists() or log.read_text().count("FAILED") < 2:
    assert time.monotonic() < deadline
    time.sleep(0.02)
  assert script.poll() is None  # it tries for as long as the machine is there
  script.kill()
  script.wait(60)
  assert not (tmp_path / "seen").exists()


def _task(tmp_path, out, code, end):
  """Runs the script as SLURM would run task 3 of job 41; its `srun` ends with that code.

  Returns:
    (exit code, what `srun` and `scontrol` were told, each with the folder it was told in)
  """
  tools, told = tmp_path / "tools", tmp_path / "told"
  tools.mkdir(exist_ok=True)
  told.write_text("")
  for tool, exit_code in (("srun", end), ("scontrol", 0)):
    (tools / tool).write_text(
        f'#!/bin/bash\n{{ pwd; printf "%s\\n" {tool} "$@"; echo; }} >> {told}\nexit {exit_code}\n')
    (tools / tool).chmod(0o755)
  text = slurm.script(f"{out}/e x/_slices/s0", slurm.Options(python=sys.executable), code, str(out))
  done = subprocess.run(
      ["bash"], input=text, text=True, timeout=60, cwd="/", capture_output=True,
      env={"PATH": f"{tools}:{os.environ['PATH']}", "SLURM_ARRAY_JOB_ID": "41",
           "SLURM_ARRAY_TASK_ID": "3"})
  return done.returncode, [tuple(said.split("\n")) for said in told.read_text().split("\n\n")[:-1]]


@pytest.mark.parametrize("end", [0, 1, 75])
def test_an_array_task_trains_its_share_and_goes_back_where_it_was_told_to_stop(
    tmp_path, out, code, end):
  home = out / "_code" / code.file_name.removesuffix(".tar.gz")
  train = (str(home), "srun", "--kill-on-bad-exit=1", sys.executable, "-m", "launch.host",
           f"--work={out}/e x/_slices/s0/3/work.json")
  requeue = (str(home), "scontrol", "requeue", "41_3")
  for _ in range(2):  # the second time the code is there
    assert _task(tmp_path, out, code, end) == (end, [train, *([requeue] if end == 75 else [])])
  assert (home / "launch" / "host.py").exists()
  assert sorted(file.name for file in home.parent.iterdir()) == [home.name, code.file_name]


def test_an_array_task_runs_no_code_that_was_changed(tmp_path, out, code):
  """Though it can be unpacked."""
  archive = gzip.compress(gzip.decompress(code.archive), mtime=1)
  (out / "_code" / code.file_name).write_bytes(archive)
  assert _task(tmp_path, out, code, 0) == (1, [])
