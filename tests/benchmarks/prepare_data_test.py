import dataclasses
import types

import numpy as np
import pytest

from benchmarks import prepare_data
from moe_jax.config import DataConfig
from moe_jax.data import adding
from moe_jax.data.prepare import prepare
from moe_jax.data.sources import Source
from moe_jax.errors import FieldError


def test_a_lost_and_a_doubled_document_would_be_seen(tmp_path, monkeypatch):
  monkeypatch.setattr(prepare_data, "_WORDS", 100)
  n_documents = prepare_data.write_text(tmp_path / "a.jsonl", 1000)
  adding.add("bench", Source((str(tmp_path / "a.jsonl"),)), tmp_path)
  prepared = prepare(DataConfig("bench"), tmp_path)
  assert prepare_data.lost_and_doubled(prepared, n_documents) == (0, 0)
  assert prepare_data.lost_and_doubled(prepared, n_documents + 2) == (2, 0)
  train = prepared.splits["train"]
  twice = dataclasses.replace(  # the held-out documents are those of the start of training
      train, starts_D1=train.starts_D1[:4], bytes_D=train.bytes_D[:3])
  changed = dataclasses.replace(prepared, splits={"train": train, "heldout": twice})
  n_heldout = prepared.splits["heldout"].n_documents
  assert prepare_data.lost_and_doubled(changed, n_documents) == (n_heldout, 3)


@pytest.mark.parametrize("lost, doubled, code", [(0, 0, 0), (1, 0, 1), (0, 1, 1)])
def test_a_lost_or_doubled_document_is_a_failure(tmp_path, monkeypatch, lost, doubled, code):
  folder = tmp_path / "new"
  for flag, value in (("_GIGABYTES", 1.0), ("_FOLDER", str(folder))):
    monkeypatch.setattr(prepare_data, flag, types.SimpleNamespace(value=value))
  monkeypatch.setattr(prepare_data, "measure", lambda _: {"lost": lost, "doubled": doubled})
  assert prepare_data.main([]) == code
  with pytest.raises(FieldError, match=r"folder='.*/new': exists; name a new folder"):
    prepare_data.main([])


def test_the_text_is_the_same_every_time(tmp_path, monkeypatch):
  monkeypatch.setattr(prepare_data, "_WORDS", 100)
  for name in "ab":
    prepare_data.write_text(tmp_path / name, 1000)
  assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
  assert np.unique((tmp_path / "a").read_text().splitlines()).size == 500
