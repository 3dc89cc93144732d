"""Bad input to the command, which needs no compiler to be told."""

import pytest

from tests.experiment_files import run_module


@pytest.mark.parametrize("flag, says", [
    ("--csv=nowhere/plan.csv", "--csv='nowhere/plan.csv': must name a file in a folder that can"),
    ("--json=tests", "--json='tests': must name a file"),
    ("--topology=v5e-64", "--topology='v5e-64': no such slice; did you mean v5litepod-64?"),
    ("--csv=", "--csv='': must be the name of a file"),
    ("--topology=v5p-064", "--topology='v5p-064': must be a gcloud name"),
    ("--config=experiments/reference.py:", "--config='experiments/reference.py:': must be FILE"),
    ("--usd_per_chip_hour=nan", "--usd_per_chip_hour=nan: must be a finite number, 0 or more"),
    ("--usd_per_chip_hour=dear", "--usd_per_chip_hour='dear': must be a number"),
    ("--slices=two", "--slices='two': must be an integer"),
    ("--parallel=0", "--parallel=0: must be at least 1"),
])
def test_bad_input_is_one_line(flag, says):
  done = run_module("-m", "moe_jax.plan", "--config=experiments/reference.py",
                    "--topology=v5p-64", flag)
  assert done.returncode == 2 and done.stdout == ""
  assert done.stderr.startswith(f"error: {says}") and done.stderr.count("\n") == 1
