"""Keeps prepared data in a local cache when --out is a bucket, since they are memory-mapped.

The local directory for `gs://b/runs/_data` is `~/.cache/moe_jax/b/runs/_data`. What can be rebuilt
is built there; added corpora and tokenizers are copied from the bucket's `_data`.
"""

import os
import pathlib
from collections.abc import Iterable

from etils import epath

from moe_jax.data.cache import MANIFEST
from moe_jax.files import files_below, write_bytes


def home(data_dir: str | os.PathLike) -> pathlib.Path:
  """Returns the local directory for `data_dir`, which is `data_dir` itself if it is local."""
  _, remote, path = os.fspath(data_dir).partition("://")
  if not remote:
    return pathlib.Path(data_dir)
  root = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
  return pathlib.Path(root) / "moe_jax" / path


def fetch(data_dir: str | os.PathLike, added: Iterable[str]) -> pathlib.Path:
  """Returns the home, after copying to it the folders `added` that a remote `data_dir` holds.

  Files that are there already are not copied again unless their size or the folder's manifest,
  which has the hash of each file, differs.
  """
  here = home(data_dir)
  for name in added if here != pathlib.Path(data_dir) else ():
    folder, target = epath.Path(data_dir) / name, here / name
    manifest = folder / MANIFEST
    replaced = manifest.exists() and not _equal(target / MANIFEST, manifest.read_bytes())
    # The manifest comes last: until it is there, an interrupted copy starts over.
    for source in sorted(files_below(folder), key=lambda file: file.name == MANIFEST):
      copy = here / source.relative_to(data_dir).as_posix()
      if replaced or not copy.exists() or copy.stat().st_size != source.stat().length:
        write_bytes(copy, source.read_bytes())
  return here


def _equal(file: pathlib.Path, content: bytes) -> bool:
  return file.exists() and file.read_bytes() == content
