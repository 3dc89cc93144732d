"""The report of a study with everything in it, of poor grids, and of the command."""

import dataclasses
import re
import subprocess
import sys

import numpy as np
import pytest

from moe_jax.laws.analysis import analyse
from moe_jax.laws.publish.page import publish
from moe_jax.laws.publish.sections import law_sections, lead_of, title_of
from moe_jax.laws.reduce import to_cells
from moe_jax.laws.table import read_results
from tests.experiment_files import ROOT
from tests.laws.identify_test import fixed_active
from tests.laws.publish.page_test import Page
from tests.laws.results_file import rows_of, write
from tests.laws.study_file import study_rows

PICTURES = ("grid", "iso-n-total", "slices", "surface", "residuals", "extrapolation",
            "stability", "claims")


@pytest.fixture(scope="module")
def study(tmp_path_factory):
  path = write(tmp_path_factory.mktemp("study"), study_rows())
  found = analyse(to_cells(read_results(path)), "paper", draws=99)
  return found, {section.key: section for section in law_sections(found, path)}


def text_of(sections) -> str:
  return "\n".join(line for section in sections for line in section.text)


def test_everything_is_drawn(study):
  for key in PICTURES:
    assert study[1][key].figure is not None and study[1][key].caption, key


def test_every_run_is_listed_with_its_identity_and_what_became_of_it(study):
  found, sections = study
  rows = sections["runs"].table.rows
  assert len(rows) == len(study_rows())
  assert {row[1] for row in rows} == {row["identity"] for row in study_rows()}
  why = [row[-1] for row in rows if row[-1]]
  assert sum("edge" in line for line in why) == 7
  assert sum("state 'diverged'" in line for line in why) == 1
  assert sum("state 'running'" in line for line in why) == 1
  for name in ("edge", "diverged", "running"):
    assert name in text_of([sections["grid"]])
  # Every loss that the fit saw names the runs that it was made of.
  for row in sections["grid"].table.rows:
    assert re.fullmatch(r"([0-9a-f]{12} ?)+", row[-1]) and len(row[-1].split()) == row[-2]
  assert len(sections["grid"].table.rows) == len(found.cells)


def test_the_page_and_the_text_say_the_same_numbers(study):
  found, sections = study
  by_name = {row[0]: row for row in sections["law"].table.rows}
  assert by_name["b_minus_c"][1:4] == (found.headline["b_minus_c"].estimate,
                                       found.headline["b_minus_c"].low,
                                       found.headline["b_minus_c"].high)
  for claim in found.claims:
    assert claim.sentence in text_of([sections["claims"]])
    assert any(claim.sentence in line for line in lead_of(found))


def test_the_second_arm_tells_experts_from_core(study):
  assert "more experts and fewer core dimensions can be separated" in text_of(
      [study[1]["claims"]])


def test_runs_that_saw_few_tokens_are_cautioned_about(study):
  cells = study[0].cells
  assert title_of(study[0]).endswith(": rehearsal")
  shares = cells.columns["tokens"] / cells.columns["n_total"]
  assert shares.min() < 20 < shares.max()
  for factor, told in ((1, f"Caution: {shares.min():.2g} to {shares.max():.2g} training"),
                       (1 / 50, "Caution: at most 0.5"), (50, None)):
    columns = {**cells.columns, "tokens": factor * cells.columns["tokens"]}
    found = dataclasses.replace(study[0], fitted=dataclasses.replace(
        study[0].fitted, cells=dataclasses.replace(cells, columns=columns)))
    cautions = [line for line in lead_of(found) if "Caution" in line]
    assert [told in line for line in cautions] == [True] * (told is not None)


def test_labels_do_not_run_into_each_other(study):
  for key in PICTURES:
    figure = study[1][key].figure
    figure.canvas.draw()
    render, whole = figure.canvas.get_renderer(), figure.bbox
    for axes in figure.axes:
      labels = [t.get_window_extent(render) for t in axes.get_xticklabels()
                if t.get_text() and t.get_visible()]
      low, high = axes.get_window_extent(render).intervalx
      boxes = sorted((box.x0, box.x1) for box in labels
                     if low - 1 <= (box.x0 + box.x1) / 2 <= high + 1)
      for (_, end), (start, _) in zip(boxes, boxes[1:], strict=False):
        assert end < start, (key, axes.get_xlabel())
      for item in (axes.xaxis.label, axes.yaxis.label, axes.title):
        box = item.get_window_extent(render)
        assert not item.get_text() or (box.x0 >= whole.x0 - 1 and box.x1 <= whole.x1 + 1), (
            key, item.get_text())


@pytest.mark.parametrize("cells,law,reasons", [
    (fixed_active(), "paper", {"iso-n-total": "sizes, none with two cells",
                               "surface": "no separate slope in sparsity",
                               "claims": "neither claim's coefficient is identified"}),
    (to_cells(rows_of(learning_rates=1, n_cells=12, tokens=(1e9, 4e9, 1.6e10))), "total-active",
     {"surface": "no separate slope in n_exp"}),
])
def test_what_cannot_be_drawn_says_why(cells, law, reasons, tmp_path):
  found = analyse(cells, law, draws=99)
  sections = law_sections(found)
  assert reasons.keys() <= {section.key for section in sections}
  for section in sections:
    if section.key in reasons:
      assert section.figure is None and reasons[section.key] in text_of([section])
  Page(publish(tmp_path / "r.html", title_of(found), lead_of(found), sections)[0].read_text())


def test_one_size_alone(tmp_path):
  cells = to_cells(rows_of(n_cells=40, learning_rates=1))
  size = cells.columns["n_total"]
  cells = cells.take(np.abs(size / np.median(size) - 1) < 0.1)
  found = analyse(cells, "paper", draws=99)
  sections = {section.key: section for section in law_sections(found)}
  assert "REFUSED" in str(sections["design"].table.rows)
  assert "n_total has one value" in text_of([sections["extrapolation"]])
  assert sections["grid"].figure is not None and sections["iso-n-total"].figure is not None


@pytest.mark.slow
def test_the_command_writes_the_same_bytes_as_another_process(study, tmp_path):
  path = write(tmp_path, study_rows())
  here = publish(tmp_path / "here" / "report.html", title_of(study[0]), lead_of(study[0]),
                 law_sections(study[0], path))  # anew: a figure is laid out when it is drawn
  done = subprocess.run([sys.executable, "-m", "moe_jax.laws", f"--results={path}", "--draws=99",
                         f"--report={tmp_path / 'there' / 'report.html'}"],
                        cwd=ROOT, capture_output=True, text=True, timeout=300)
  assert done.returncode == 0, done.stderr
  assert "report.html, and 24 figures and tables in" in done.stdout
  assert len(here) == 25
  for file in here:
    there = tmp_path / "there" / file.relative_to(tmp_path / "here")
    assert file.read_bytes() == there.read_bytes(), file.name


def test_a_report_that_cannot_be_is_refused_before_anything_is_read(tmp_path):
  done = subprocess.run([sys.executable, "-m", "moe_jax.laws", "--results=nope.csv",
                         "--report=r.pdf"], cwd=ROOT, capture_output=True, text=True, timeout=120)
  assert done.returncode == 2
  assert done.stderr == "error: --report='r.pdf': must end in .html\n"
