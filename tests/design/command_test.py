"""The command as a user meets it."""

import csv
import json

import numpy as np
import pytest

from tests.experiment_files import run_module
from tests.laws.results_file import rows_of, write

BUDGETS = ("--memory_gb=16GB", "--active_params=200M", "--tokens=9B")
QUICK = ("--multiple=256", "--aspect=48:96", "--granularity=1:8")


def run(*arguments):
  return run_module("-m", "moe_jax.design", *arguments)


def test_all_laws_at_once(tmp_path):
  done = run(*BUDGETS, *QUICK, f"--csv={tmp_path / 'out.csv'}", f"--plot={tmp_path / 'out.png'}")
  assert done.returncode == 0, done.stderr
  for part in ("at most 16 GB", "at most 200M", "9B training tokens", "vocabulary of 50,304",
               "law by law", "Law against law", "cannot distinguish from its best",
               "Price of each budget", "principle of arXiv 2601.08215",
               "is below 1.6e+10, the minimum it was fitted on", "in its domain"):
    assert part in done.stdout, part
  for law in ("krajewski", "joint-moe", "zhao", "ling", "flame-moe", "clark", "abnar"):
    assert done.stdout.count(f"\n {law} ") >= 4, law
  with (tmp_path / "out.csv").open() as file:
    lines = list(csv.DictReader(file))
  for law in ("zhao", "ling"):
    ours = [line for line in lines if line["law"] == law]
    front = [line for line in ours if line["what"] == "front"]
    assert [line["what"] for line in ours[:2]] == ["best", "principle"] and len(front) > 20
    assert all(float(line["memory_gb"]) <= 16 and int(line["n_active"]) <= 2e8 for line in front)
    worse = [float(line["worse_percent"]) for line in front]
    assert min(worse) < 0.011 and worse == sorted(worse)
  assert (tmp_path / "out.png").read_bytes()[:4] == b"\x89PNG"


def test_a_page_with_the_fronts_is_the_same_every_time(tmp_path):
  pages = []
  for name in ("a", "b"):
    page = tmp_path / name / "design.html"
    page.parent.mkdir()
    done = run(*BUDGETS, *QUICK, "--law=zhao", f"--report={page}")
    assert done.returncode == 0, done.stderr
    pages.append(page.read_bytes())
    assert (page.parent / "design_files" / "pareto.png").read_bytes()[:4] == b"\x89PNG"
    assert "16 GB,2.9" in (page.parent / "design_files" / "front_zhao.csv").read_text()
  assert pages[0] == pages[1]
  for part in (b"Pareto", b"data:image/png", b"The best architecture", b"Price of each budget"):
    assert part in pages[0]


def test_on_chips_as_json():
  done = run("--hardware=v5e-8", "--batch=64", "--context=8192", "--decode_ms=10", "--tokens=1T",
             "--prefill_ms=400", "--law=abnar", "--kv_heads=8", "--dtype=fp8", "--json", *QUICK)
  assert done.returncode == 0, done.stderr
  found = json.loads(done.stdout)
  (law,) = found["laws"]
  best = law["best"]
  assert best["decode_ms"] <= 10 and best["prefill_ms"] <= 400 and best["n_kv_heads"] == 8
  assert found["budgets"]["memory_gb"] == pytest.approx(123.69, abs=0.01)
  assert best["regret_percent"]["abnar"] < 0.011 and law["loss"] < 3
  assert found["hardware"] == "v5e-8" and found["chosen"] is None


def test_a_law_of_ones_own(tmp_path):
  path = write(tmp_path, rows_of(n_cells=24, learning_rates=1))
  done = run(f"--results={path}", *BUDGETS[:2], *QUICK)
  assert done.returncode == 0, done.stderr
  assert "jackknife over 24 architectures" in done.stdout
  assert "The Pareto front under paper" in done.stdout and "9B training tokens" in done.stdout
  assert "paper, fitted to 24 cells; depends on n_total, n_exp, sparsity" in done.stdout


def test_like_a_published_model():
  done = run("--like=OLMoE-1B-7B", "--law=zhao", *QUICK)
  assert done.returncode == 0, done.stderr
  assert "published model   l16-d2048-f1024-e64-k8" in done.stdout
  assert "at most 14.38 GB" in done.stdout and "at most 1.08B" in done.stdout


@pytest.mark.parametrize("arguments, line", [
    ([], "active_params=None: is missing"),
    (["--memory_gb=lots", *BUDGETS[1:]], "memory_gb='lots': must be a size"),
    (["--memory_gb=0.01", *BUDGETS[1:]], "memory_gb=0.01: too small; the smallest that works"),
    ([*BUDGETS, "--law=clark"], "law='clark': has no variable for tokens"),
    ([*BUDGETS, "--hardware=v5f-8"], "hardware='v5f-8': must be CHIP-CHIPS"),
    ([*BUDGETS, "--experts=512:8"], "experts='512:8': must be LOW:HIGH"),
    ([*BUDGETS, "--where=state=finished"], "where='state=finished': needs --results"),
    ([*BUDGETS, "--head_dim=33"], "head_dim=33: must be even"),
    ([*BUDGETS, "--csv=/no/such/folder/x.csv"], "csv='/no/such/folder/x.csv': must name a file"),
    (["--like=OLMoE-1B-7B", "--vocab_size=100"], "vocab_size=100: contradicts --like"),
    ([*BUDGETS, "--config.train.steps=3"], "config.train.steps='3': is not a flag"),
])
def test_bad_input_is_one_line_and_exit_code_2(arguments, line):
  done = run(*arguments)
  assert done.returncode == 2 and done.stdout == ""
  assert done.stderr.startswith(f"error: --{line}"), done.stderr
  assert done.stderr.count("\n") == 1


def test_a_grid_of_one_size_cannot_choose_a_size(tmp_path):
  rows = [row for row in rows_of(n_cells=40, learning_rates=1)
          if abs(np.log(row["n_total"] / 1e8)) < 0.04]
  done = run(f"--results={write(tmp_path, rows)}", *BUDGETS)
  assert done.returncode == 2 and "these data do not identify a " in done.stderr
