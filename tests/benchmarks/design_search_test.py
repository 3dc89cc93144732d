import dataclasses

import pytest

from benchmarks import design_search
from moe_jax.design.space import Space

SMALL = Space(multiple=512, experts=(8, 64))


@pytest.mark.parametrize("name", design_search.QUESTIONS)
def test_measures_and_compares(name):
  question = dataclasses.replace(design_search.QUESTIONS[name], space=SMALL)
  row = design_search.measure(question, n_sample=20, repeats=1)
  assert row["sample"] == 20 and row["largest_difference"] < 1e-9
  assert 100 < row["judged"] <= row["priced"] < row["lattice"]
  assert row["seconds"] > 0 and row["answer_seconds"] > 0


def test_a_disagreement_is_an_error(monkeypatch):
  monkeypatch.setattr(design_search, "scalar_decode_ms", lambda arch, serving: 1.0)
  question = dataclasses.replace(design_search.QUESTIONS["decode roofline, abnar"], space=SMALL)
  with pytest.raises(RuntimeError, match="disagree"):
    design_search.measure(question, n_sample=20, repeats=1)
