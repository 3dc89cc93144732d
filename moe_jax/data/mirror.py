"""Prepared data are read by memory map, so they lie on this machine also where --out is a bucket.

`gs://b/runs/_data` has its home in `~/.cache/moe_jax/b/runs/_data`. What can be made again is made
there; texts and tokenizers that lie in the bucket's own `_data` are copied.
"""

import os
import pathlib
from collections.abc import Iterable

from etils import epath

from moe_jax.files import files_below, write_bytes


def home(data_dir: str | os.PathLike) -> pathlib.Path:
  """Where what `<out>/_data` stands for lies on this machine."""
  _, remote, path = os.fspath(data_dir).partition("://")
  if not remote:
    return pathlib.Path(data_dir)
  root = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
  return pathlib.Path(root) / "moe_jax" / path


def fetch(data_dir: str | os.PathLike, added: Iterable[str]) -> pathlib.Path:
  """The home, to which those of the folders `added` that a remote `data_dir` has are copied."""
  here = home(data_dir)
  for name in added if here != pathlib.Path(data_dir) else ():
    for source in files_below(epath.Path(data_dir) / name):
      target = here / source.relative_to(data_dir).as_posix()
      if not target.exists() or target.stat().st_size != source.stat().length:
        write_bytes(target, source.read_bytes())
  return here
