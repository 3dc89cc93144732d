"""The command as a user meets it."""

import subprocess
import sys

import pytest

from moe_jax.laws.analysis import analyse
from moe_jax.laws.reduce import to_cells
from moe_jax.laws.report import report
from tests.experiment_files import ROOT
from tests.laws.results_file import rows_of, write


def run(*arguments):
  return subprocess.run([sys.executable, "-m", "moe_jax.laws", *arguments], cwd=ROOT,
                        capture_output=True, text=True, timeout=120)


def test_a_report(tmp_path):
  path = write(tmp_path, rows_of(seeds=2))
  done = run(f"--results={path}", "--draws=99")
  assert done.returncode == 0, done.stderr
  text = done.stdout
  for part in ("24 cells", "every coefficient is identified", "bootstrap-t",
               "profile likelihood", "huber", "leaving one architecture out",
               "leaving one n_exp out", "extrapolation to sparsity", "AICc",
               "F-test of paper against total-sparsity", "sparsity hurts (c > 0): shown",
               "more experts hurt", "confounded in these data"):
    assert part in text, part
  # The design report stands before any number of the fit.
  assert text.index("condition index") < text.index("two solvers")


@pytest.mark.parametrize("arguments,line", [
    (["--results=nope.csv"], "error: --results='nope.csv': cannot be read"),
    (["--results={path}", "--law=papr"], "error: --law='papr': did you mean 'paper"),
    (["--results={path}", "--where=state=running"], "error: --where='state=running'"),
    (["--results={path}", "--margin_percent=-1"],
     "error: --margin_percent=-1.0: must be above 0 and below 100"),
])
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, arguments, line):
  path = write(tmp_path, rows_of(learning_rates=1))
  done = run(*[argument.format(path=path) for argument in arguments])
  assert done.returncode == 2 and done.stdout == ""
  assert done.stderr.startswith(line) and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_a_form_with_tokens():
  text = "\n".join(report(analyse(
      to_cells(rows_of(tokens=(1e9, 4e9, 1.6e10), n_cells=12)), "paper-tokens", draws=99)))
  assert "variable projection" in text and "ln_E" in text and "rival forms" not in text


def test_what_is_refused_is_not_reported():
  cells = to_cells(rows_of(n_cells=40, learning_rates=1))
  few = cells.take(cells.columns["n_topk"] == 1)
  text = "\n".join(report(analyse(few, "paper", draws=99)))
  assert "b_minus_c: REFUSED" in text and "identified instead" in text
  fitted = text[text.index("two solvers"):text.index("trust")]
  assert "b_minus_c" not in fitted and "slope_" in fitted


def test_the_room_loads_nothing_slow():
  code = ("import sys, moe_jax.laws.__main__, moe_jax.laws.registry; "
          "print(sorted({'jax', 'scipy.optimize', 'scipy.stats', 'matplotlib'} "
          "& set(sys.modules)))")
  done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
  assert done.stdout.strip() == "[]", done.stderr
