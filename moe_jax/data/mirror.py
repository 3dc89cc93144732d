"""Keeps prepared data in a local cache when --out is a bucket, since they are memory-mapped.

The local directory for `gs://b/runs/_data` is `~/.cache/moe_jax/b/runs/_data`. What can be rebuilt
is built there; added corpora and tokenizers are copied from the bucket's `_data`.
"""

import os
import pathlib
from collections.abc import Iterable

from etils import epath

from moe_jax.files import files_below, write_bytes


def home(data_dir: str | os.PathLike) -> pathlib.Path:
  """Returns the local directory for `data_dir`, which is `data_dir` itself if it is local."""
  _, remote, path = os.fspath(data_dir).partition("://")
  if not remote:
    return pathlib.Path(data_dir)
  root = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
  return pathlib.Path(root) / "moe_jax" / path


def fetch(data_dir: str | os.PathLike, added: Iterable[str]) -> pathlib.Path:
  """Returns the home, after copying to it the folders `added` that a remote `data_dir` holds."""
  here = home(data_dir)
  for name in added if here != pathlib.Path(data_dir) else ():
    for source in files_below(epath.Path(data_dir) / name):
      target = here / source.relative_to(data_dir).as_posix()
      if not target.exists() or target.stat().st_size != source.stat().length:
        write_bytes(target, source.read_bytes())
  return here
