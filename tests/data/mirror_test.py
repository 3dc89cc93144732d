"""Added corpora reach a machine whose --out is a bucket, and replaced ones replace theirs."""

import json

import pytest

from moe_jax.data import mirror
from moe_jax.data.cache import MANIFEST

FOLDER = "runs/_data/mine/dataset"


def put(gcs, shard: bytes) -> None:
  manifest = json.dumps({"files": {"shard": {"sha256": shard.decode()}}}).encode()
  for name, content in ((MANIFEST, manifest), ("shard", shard)):
    gcs.put("bucket", f"{FOLDER}/{name}", content, {})


def test_a_corpus_that_was_replaced_by_one_of_equal_size_is_copied_again(
    gcs, tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  here = tmp_path / "moe_jax/bucket" / FOLDER
  for content in (b"first", b"other"):
    put(gcs, content)
    mirror.fetch("gs://bucket/runs/_data", ["mine/dataset"])
    assert (here / "shard").read_bytes() == content
    assert content.decode() in (here / MANIFEST).read_text()


def test_a_copy_that_was_interrupted_starts_over(gcs, tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  put(gcs, b"first")
  mirror.fetch("gs://bucket/runs/_data", ["mine/dataset"])
  put(gcs, b"other")
  write, written = mirror.write_bytes, []

  def until_killed(file, content):
    if written:
      raise KeyboardInterrupt
    written.append(file)
    write(file, content)

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(mirror, "write_bytes", until_killed)
    mirror.fetch("gs://bucket/runs/_data", ["mine/dataset"])
  mirror.fetch("gs://bucket/runs/_data", ["mine/dataset"])
  assert (tmp_path / "moe_jax/bucket" / FOLDER / "shard").read_bytes() == b"other"


def test_what_is_there_is_not_copied_again(gcs, tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  here = tmp_path / "moe_jax/bucket" / FOLDER
  put(gcs, b"first")
  mirror.fetch("gs://bucket/runs/_data", ["mine/dataset"])
  (here / "shard").write_bytes(b"local")  # of equal size: would be overwritten by a copy
  mirror.fetch("gs://bucket/runs/_data", ["mine/dataset"])
  assert (here / "shard").read_bytes() == b"local"


def test_a_local_directory_is_its_own_home(tmp_path):
  assert mirror.fetch(tmp_path, ["mine/dataset"]) == tmp_path
  assert not list(tmp_path.iterdir())
