"""The command line: typed overrides in process, refusals through a real command."""

import signal
import subprocess
import sys

import pytest

from moe_jax import cli
from moe_jax.errors import FieldError
from tests.experiment_files import BASE, ROOT, run_module, write, write_tiny


@pytest.mark.parametrize("argument, parsed", [
    ("--config.train.steps=200", ("train.steps", 200)),
    ("--config.train.learning_rate=3e-4", ("train.learning_rate", 3e-4)),
    ("--config.moe.norm_topk_prob=false", ("moe.norm_topk_prob", False)),
    ("--config.arch.head_dim=none", ("arch.head_dim", None)),
    ("--config.data.corpus=a=b", ("data.corpus", "a=b")),
    ("--config.train.tokens=9e9", ("train.tokens", 9e9)),
])
def test_an_override_is_typed_by_its_field(argument, parsed):
  assert cli.parse_override(argument) == parsed


@pytest.mark.parametrize("argument, message", [
    ("--config.train.stepz=1", r"config\.train\.stepz='1': .*'config\.train\.steps'"),
    ("--config.train=1", r"config\.train='1': no such field; did you mean"),
    ("--config.train.steps", r"needs a value: --config\.train\.steps=VALUE"),
    ("--config.train.steps=1.5", r"config\.train\.steps='1\.5': must be a whole number"),
])
def test_a_wrong_override_is_refused(argument, message):
  with pytest.raises(FieldError, match=message):
    cli.parse_override(argument)


def test_overrides_are_taken_out_of_what_absl_reads():
  argv = ["prog", "--config=f.py", "--config.seed_init=1", "--out=x"]
  assert cli.split_overrides(argv) == (["prog", "--config=f.py", "--out=x"],
                                       ["--config.seed_init=1"])


@pytest.fixture
def command(tmp_path):
  """A command of the project, smaller than any real one."""
  return write(tmp_path, '''"""Prints the cells that are selected."""
from absl import flags
from moe_jax import cli

_CONFIG = cli.define_config_flag()
_PARALLEL = flags.DEFINE_integer("parallel", 1, "How many.", lower_bound=1)
_LOUD = flags.DEFINE_bool("loud", False, "Whether.")
_HOW = flags.DEFINE_enum("how", "well", ("well", "better"), "How.")

def main(overrides):
  print([cell.name for cell in cli.selected_cells(_CONFIG.value, overrides)])
  return 5

if __name__ == "__main__":
  cli.run(main)
''', "command.py")


def test_a_command_gets_its_cells_and_gives_its_exit_code(command, tmp_path):
  done = run_module(command, f"--config={write_tiny(tmp_path)}:{BASE}",
                    "--config.train.learning_rate=0.5")
  assert (done.returncode, done.stderr) == (5, "")
  assert done.stdout.strip() == f"['{BASE}-lr0.5']"


@pytest.mark.parametrize("arguments, message", [
    ([], "--config: is required: Experiment file"),
    (["--confg=x.py"], "--confg: no such flag; did you mean 'config'"),
    (["--config=TINY", "--parallel=x"], "--parallel='x': must be a positive integer"),
    (["--config=TINY", "--parallel=0"], "--parallel=0: must be a positive integer"),
    (["--config=TINY", "--loud=perhaps"], "--loud='perhaps': must be true or false"),
    (["--config=TINY", "--how=ill"], "--how='ill': must be well or better"),
    (["--config=TINY", "train"], "'train': not a flag"),
    (["--config=TINY", "--config.train.stepz=1"], "did you mean 'config.train.steps'"),
    (["--config=TINY", "--config.train.steps"], "needs a value"),
    (["--config=TINY", "--config.train.steps", "7"],
     "--config.train.steps='': needs a value: --config.train.steps=VALUE"),
    (["--config=TINY", "-config.arch.n_topk=9"], "--config.arch.n_topk=9: must be at most n_exp"),
    (["--config=TINY", "--config.train.tokens=1e6", "--config.train.batch_size=0"],
     "--config.train.batch_size=0: must be at least 1"),
    (["--config=TINY", "--config.train.learning_rate=5e-324"],
     "--config.train.learning_rate=5e-324: must lie between 1e-37 and 1e+37"),
    (["--config=" + "a" * 300 + ".py"], "no such experiment file"),
    (["--config=TINY", "--config.arch.n_topk=9"],
     "--config.arch.n_topk=9: must be at most n_exp, which is 4"),
    (["--config=TINY:"], ":': must be FILE, FILE:CELL or FILE:CELL,CELL: a name is empty"),
    (["--config=TINY:l2-d32"], "no such cell; did you mean"),
    (["--config=nowhere.py"], "--config='nowhere.py': no such experiment file"),
    (["--config=README.md"], "no such experiment file; one of experiments/balancing.py, "),
])
def test_bad_input_ends_in_one_line_and_exit_code_2(command, tmp_path, arguments, message):
  file = write_tiny(tmp_path)
  done = run_module(command, *(argument.replace("TINY", file) for argument in arguments))
  assert done.returncode == cli.EXIT_BAD_INPUT
  assert done.stdout == ""
  assert done.stderr.startswith("error: ")
  assert message in done.stderr
  assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("command, message", [
    (("launch.submit", "--config=TINY", "--dryrun"),
     "--dryrun: no such flag; did you mean 'dry_run'"),
    (("launch.submit", "--config=TINY", "--dry_run=yaml"),
     "--dry_run='yaml': must be true or json or false"),
    (("launch.submit", "--config=TINY", "--out="), "--out='': must name a directory"),
    (("moe_jax.evaluate", "--config=TINY", "--top_k=3"), "--top_k=3: requires --generate"),
    (("moe_jax.evaluate", "--config=TINY", "--generate=x", "--compare=a,b"),
     "--compare='a,b': cannot be combined with --generate"),
    (("benchmarks.grid", "--grid_experiment=nowhere.py"), "='nowhere.py': no such experiment file"),
    (("benchmarks.startup", "--startup_cell=TINY"), "must be one cell, FILE:CELL"),
    (("benchmarks.iso_solver", "--config.train.steps=7"), "is not a flag of this command"),
    (("benchmarks.law_coverage", "--grids=0"), "--grids=0: must be a positive integer"),
    (("experiments.study.sitting", "--grids="), "--grids='': must be one of pilots"),
    (("experiments.study.keep", "--out=TINY"), "must be a folder of runs or a .zip"),
])
def test_what_commands_refuse_is_one_line_too(tmp_path, command, message):
  file = write_tiny(tmp_path)
  done = run_module("-m", *(argument.replace("TINY", file) for argument in command))
  assert done.returncode == cli.EXIT_BAD_INPUT and message in done.stderr, done.stderr
  assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_help_names_the_flags_of_the_command(command):
  done = run_module(command, "--help")
  assert "Prints the cells" in done.stdout
  assert "--config:" in done.stdout
  assert "--parallel:" in done.stdout
  assert done.stderr == ""


@pytest.mark.parametrize("seeds", [1, 300])  # what the buffer holds until the end, and more
def test_a_reader_that_has_seen_enough_ends_it_without_a_traceback(tmp_path, seeds):
  command = [sys.executable, "-m", "launch.submit", f"--config={write_tiny(tmp_path, seeds)}",
             f"--out={tmp_path / 'runs'}", "--dry_run"]
  process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
  process.stdout.close()
  with process.stderr:
    assert process.stderr.read() == b""
  assert process.wait() == 128 + signal.SIGPIPE


@pytest.mark.parametrize("flags, before, after", [
    ("--xla_force_host_platform_device_count=8", {}, {"NPROC": "64"}),
    ("--a=1 --xla_force_host_platform_device_count=512 --b", {}, {"NPROC": "4096"}),
    ("--xla_force_host_platform_device_count=2", {}, {"NPROC": "48"}),
    ("--xla_force_host_platform_device_count=8", {"NPROC": "4"}, {"NPROC": "4"}),
    ("", {}, {})])
def test_fake_devices_have_threads_for_their_collectives(monkeypatch, flags, before, after):
  monkeypatch.setattr(cli.os, "environ", {"XLA_FLAGS": flags, **before})
  monkeypatch.setattr(cli.os, "cpu_count", lambda: 48)
  cli.give_fake_devices_threads()
  assert cli.os.environ == {"XLA_FLAGS": flags, **after}
