"""Both commands as a user meets them."""

import re

import pytest

from moe_jax.grid import load_grid
from tests.experiment_files import run_module


def test_power_of_a_grid_that_has_not_been_run():
  done = run_module("-m", "moe_jax.study.power", "--config=experiments/quickstart.py")
  assert done.returncode == 0, done.stderr
  text = done.stdout
  assert "between seeds 0.2 % of the loss (assumed)" in text
  assert "a: REFUSED, ln n_total hardly varies" in text
  assert re.search(r"^b_minus_c +n_exp +3 +± [\d.]+ % +[\d.]+ %", text, re.MULTILINE)


def test_power_of_results(results):
  done = run_module("-m", "moe_jax.study.power", f"--results={results}", "--law=paper-curved")
  assert done.returncode == 0, done.stderr
  assert "from the residuals, 7 degrees of freedom" in done.stdout
  assert "every coefficient is identified" in done.stdout


def test_the_next_runs_are_written_and_can_be_launched(results, tmp_path):
  file = tmp_path / "next.py"
  done = run_module("-m", "moe_jax.study.next", f"--results={results}", "--add=2",
                    f"--write={file}")
  assert done.returncode == 0, done.stderr
  assert "so far" in done.stdout and f"--config={file}" in done.stdout
  names = load_grid(str(file)).names
  launched = run_module("-m", "launch.submit", f"--config={file}", f"--out={tmp_path}",
                        "--dry_run")
  assert launched.returncode == 0, launched.stderr
  for name in names:
    assert name in done.stdout and f"{file}:{name}" in launched.stdout


@pytest.mark.parametrize("module,arguments,line", [
    ("power", [], "error: --config=None: give either --config"),
    ("power", ["--config=experiments/quickstart.py", "--fold=1"], "error: --fold=1.0: must be"),
    ("power", ["--config=experiments/quickstart.py", "--law=paper-tokens"],
     "error: --law='paper-tokens': is not log-log"),
    ("power", ["--config=experiments/quickstart.py", "--seed_sd=2"], "error: --seed_sd=2.0: must"),
    ("next", ["--results=nope.csv"], "error: --results='nope.csv': cannot be read"),
    ("next", ["--results={results}", "--write=experiments/quickstart.py"],
     "error: --write='experiments/quickstart.py': exists, and is not overwritten"),
    ("next", ["--results={results}", "--n_exp=8,many"], "error: --n_exp='many': must be"),
    ("next", ["--results={results}", "--choice_n_total=1M"],
     "error: --choice_n_total='1M': applies only to --target=choice"),
    ("learning_rate", ["--results={results}"],
     "error: --results='{results}': has no architecture with several learning rates"),
    ("learning_rate", ["--results={results}", "--write=rates.csv"],
     "error: --write='rates.csv': must end in .json"),
    ("learning_rate", ["--results={results}", "--check={results}"],
     "error: --check='{results}': is damaged"),
    ("next", ["--results={results}", "--config.train.steps=3"],
     "error: --config.train.steps='3': is not a flag of this command"),
])
def test_bad_input_is_one_line_and_exit_code_2(results, module, arguments, line):
  done = run_module("-m", f"moe_jax.study.{module}",
                    *[argument.format(results=results) for argument in arguments])
  assert done.returncode == 2 and done.stdout == ""
  assert done.stderr.startswith(line.format(results=results)) and done.stderr.count("\n") == 1
