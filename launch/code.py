"""Packs a submission's exact code: HEAD, uncommitted changes to tracked files, the experiment.

Untracked files, which may hold secrets, are left out, except for the experiment file itself.
"""

import dataclasses
import gzip
import hashlib
import io
import json
import os
import pathlib
import subprocess
import tarfile
import tempfile

from moe_jax.errors import FieldError

_ROOT = pathlib.Path(__file__).resolve().parent.parent
_IDENTITY = {f"GIT_{who}_{what}": value for who in ("AUTHOR", "COMMITTER") for what, value in (
    ("NAME", "moe_jax"), ("EMAIL", "moe_jax@localhost"))}


@dataclasses.dataclass(frozen=True)
class Code:
  """The code that a machine unpacks before it trains.

  Attributes:
    commit: HEAD, with `+` if tracked files differ from it.
    sha256: hash of the archive, which also names it.
    experiment: the experiment file's path in the archive.
    archive: the content, a .tar.gz.
    left_out: untracked Python files that are not in the archive.
  """

  commit: str
  sha256: str
  experiment: str
  archive: bytes = dataclasses.field(repr=False, compare=False)
  left_out: tuple[str, ...] = ()

  @property
  def file_name(self) -> str:
    return f"{self.sha256}.tar.gz"


def pack(experiment: str, root: pathlib.Path = _ROOT) -> Code:
  """Packs the code at `root`, a git checkout, with the experiment file.

  Deterministic: the same files give the same bytes.

  Raises:
    FieldError: `root` is not a git checkout with a commit.
  """
  file = pathlib.Path(experiment).resolve()
  inside = file.is_relative_to(root)
  where = os.fspath(file.relative_to(root)) if inside else f"_submitted/{file.name}"
  with tempfile.TemporaryDirectory() as scratch:
    git = _Git(root, scratch)
    head = git("rev-parse", "HEAD")
    git("read-tree", "HEAD")
    git("add", "--update")
    if inside:
      git("add", "--force", "--", where)
    tree = git("write-tree")
    dirty = tree != git("rev-parse", "HEAD^{tree}")
    # A commit rather than the bare tree, so that files in the archive get its fixed time.
    date = git("show", "--no-patch", "--format=%ct +0000", "HEAD")
    snapshot = git("commit-tree", tree, "-p", head, "-m", "submitted", date=date)
    tar = git.bytes("archive", "--format=tar", snapshot)
    left_out = git("ls-files", "--others", "--exclude-standard", "--", "*.py").splitlines()
  commit = head[:12] + ("+" if dirty else "")
  added = {"code.json": json.dumps({"commit": commit, "head": head, "tree": tree}).encode()}
  if not inside:
    added[where] = file.read_bytes()
  archive = gzip.compress(_with_files(tar, added), mtime=0)
  return Code(commit, hashlib.sha256(archive).hexdigest(), where, archive, tuple(left_out))


class _Git:
  """Runs git in a checkout with a scratch index and object store, so nothing there changes."""

  def __init__(self, root: pathlib.Path, scratch: str):
    self._root = root
    self._environ = os.environ | _IDENTITY
    # Inside a git hook these are set, and would point elsewhere.
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_OBJECT_DIRECTORY"):
      self._environ.pop(name, None)
    objects = self("rev-parse", "--path-format=absolute", "--git-path", "objects")
    self._environ |= {
        "GIT_INDEX_FILE": os.path.join(scratch, "index"), "GIT_OBJECT_DIRECTORY": scratch,
        "GIT_ALTERNATE_OBJECT_DIRECTORIES": objects}

  def __call__(self, *arguments: str, date: str = "") -> str:
    return self.bytes(*arguments, date=date).decode().strip()

  def bytes(self, *arguments: str, date: str = "") -> bytes:
    environ = self._environ
    if date:
      environ = environ | {"GIT_AUTHOR_DATE": date, "GIT_COMMITTER_DATE": date}
    try:
      return subprocess.run(["git", *arguments], cwd=self._root, env=environ, check=True,
                            capture_output=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
      said = getattr(error, "stderr", b"").decode(errors="replace") or str(error)
      raise FieldError("backend", os.fspath(self._root), "must be a git checkout to ship its "
                       f"code to other machines: {' '.join(said.split())}") from None


def _with_files(tar: bytes, files: dict[str, bytes]) -> bytes:
  buffer = io.BytesIO(tar)
  with tarfile.open(fileobj=buffer, mode="a") as archive:
    for name, content in files.items():
      info = tarfile.TarInfo(name)
      info.size = len(content)
      archive.addfile(info, io.BytesIO(content))
  return buffer.getvalue()
