"""A user's files: what is read of them however they are cut, and what is refused."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.data import readers, sources
from moe_jax.data.sources import Source
from moe_jax.errors import FieldError


def read_all(*files, **options):
  """(name, text) of all documents of a source, unit by unit."""
  source = Source(tuple(str(file) for file in files), **options)
  return [document for unit in sources.make_plan(source).units for piece in unit
          for document in readers.read_piece(piece, source)]


def texts(*files, **options):
  return [text for _, text in read_all(*files, **options)]


def write_json(file, values):
  file.write_text("".join(json.dumps(value) + "\n" for value in values))
  return file


any_texts = st.lists(st.text(st.characters(codec="utf-8"), max_size=30), min_size=1, max_size=20)


@given(any_texts, st.integers(1, 60), st.sampled_from(["", "\n", "\n\n"]), st.integers(1, 50))
@settings(max_examples=80, deadline=None)
def test_json_lines_are_read_once_wherever_they_are_cut(tmp_path_factory, found, unit, end, block):
  file = tmp_path_factory.mktemp("json") / "a.jsonl"
  file.write_text("\n".join(json.dumps({"text": text}) for text in found) + end)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sources, "UNIT_BYTES", unit)
    patch.setattr(readers, "_BLOCK_BYTES", block)
    names, read = zip(*read_all(file), strict=True)
  assert list(read) == found
  assert len(set(names)) == len(names)


@given(any_texts, st.integers(1, 60), st.sampled_from(["<|end|>", "\n", "\n\n", "aba"]),
       st.integers(1, 50))
@settings(max_examples=80, deadline=None)
def test_separated_text_is_read_once_wherever_it_is_cut(tmp_path_factory, found, unit, separator,
                                                        block):
  file = tmp_path_factory.mktemp("text") / "a.txt"
  content = separator.join(found).replace("\0", "").encode()
  file.write_bytes(content)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sources, "UNIT_BYTES", unit)
    patch.setattr(readers, "_BLOCK_BYTES", block)
    read = texts(file, separator=separator)
  expected = [part.strip() for part in content.decode("utf-8-sig").split(separator)]
  assert [text for text in read if text] == [text for text in expected if text]


def test_a_folder_is_read_in_the_order_of_names_whatever_the_files(tmp_path):
  (tmp_path / "b").mkdir()
  (tmp_path / "b" / "c.md").write_text("third")
  (tmp_path / "a.txt").write_text("\ufefffirst")
  with gzip.open(tmp_path / "ab.jsonl.gz", "wt") as file:
    file.write('{"text": "second"}\n{"text": null}\n')
  (tmp_path / ".hidden").write_bytes(b"\xff")
  pyarrow.parquet.write_table(pyarrow.table({"n": [1, 2, 3], "text": ["4th", None, "5th"]}),
                              tmp_path / "d.parquet", row_group_size=1)
  assert read_all(tmp_path) == [
      ("a.txt", "first"), ("ab.jsonl.gz@0", "second"), ("ab.jsonl.gz@19", ""),
      ("b/c.md", "third"), ("d.parquet:0", "4th"), ("d.parquet:1", ""), ("d.parquet:2", "5th")]
  assert texts(tmp_path / "*" / "*.md", tmp_path / "a.txt") == ["first", "third"]
  assert texts(tmp_path / "**" / "*.parquet") == ["4th", "", "5th"]


@pytest.mark.parametrize("content, name, message", [
    (b"\x89PNG\r\n\x1a\n\0\0", "a.txt", r"from='.*a\.txt': is binary \(byte 8 is zero\)"),
    ("text".encode("utf-16"), "a.txt", r"a\.txt': is binary"),
    (b"caf\xe9 au lait", "a.txt", r"a\.txt': must be UTF-8 text: byte 3, 0xe9"),
    (b'{"text": "caf\xe9"}\n', "a.jsonl", r"a\.jsonl:1': is not JSON: .*codec"),
    (b'{"text": "x"}\n\n{"text": \n', "a.jsonl", r"a\.jsonl:3': is not JSON: Expecting value"),
    (b"[" * 200_000, "a.jsonl", r"a\.jsonl:1': is not JSON"),
    (b'{"text": "x"}\n["text"]\n', "a.json", r"a\.json:2': is JSON but not an object"),
    (b'{"text": "x"}\n{"txt": "x"}\n', "a.jsonl",
     r"text_field='text': is not a field of .*a\.jsonl:2; did you mean 'txt'\?"),
    (b'{"text": ["x"]}\n', "a.jsonl", r"text_field='text': is a list in .*a\.jsonl:1"),
    (b'{"text": "\\ud800"}\n', "a.jsonl", r"a\.jsonl:1': contains an unpaired surrogate"),
    (b"PAR1 and no more", "a.parquet", r"a\.parquet': is not a Parquet file"),
    (b"not gzip", "a.jsonl.gz", r"a\.jsonl\.gz': cannot be read: zlib"),
    (gzip.compress(b'{"text": "x"}\n' * 9, mtime=0)[:-9], "a.jsonl.gz",
     r"a\.jsonl\.gz': cannot be read"),
])
def test_what_is_no_text_is_refused_in_one_line(content, name, message, tmp_path):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(FieldError, match=message) as caught:
    texts(tmp_path / name)
  assert "\n" not in str(caught.value)


def test_a_document_that_is_too_long_is_refused(tmp_path):
  (tmp_path / "a.txt").write_bytes(b"word " * 10_000_000)
  with pytest.raises(FieldError, match=r"a\.txt': is a document of at least 50,000,000 "
                     "bytes; the limit is 33,554,432: split it, or give .*--separator"):
    texts(tmp_path / "a.txt")
  with pytest.raises(FieldError, match=r"a\.txt, from byte 0': is a document of at least 3"):
    texts(tmp_path / "a.txt", separator="<|end|>")


def test_a_line_of_json_may_be_longer_than_its_document(tmp_path, monkeypatch):
  monkeypatch.setattr(readers, "_MAX_LINE_BYTES", 1000)
  monkeypatch.setattr(readers, "_BLOCK_BYTES", 100)
  (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a", "more": "b" * 2000}))
  with pytest.raises(FieldError, match="of at least 1,1.* bytes; the limit is 1,000:"):
    texts(tmp_path / "a.jsonl")


def test_a_column_that_is_not_there_or_no_text_is_refused(tmp_path):
  pyarrow.parquet.write_table(pyarrow.table({"content": ["a"], "n": [1]}), tmp_path / "a.parquet")
  for field, message in [("contents", r"is not a column of .*a\.parquet; did you mean 'content'"),
                         ("n", r"is a column of int64 in .*a\.parquet; it must be text")]:
    with pytest.raises(FieldError, match=f"text_field='{field}': {message}"):
      texts(tmp_path, text_field=field)


def test_a_path_that_names_nothing_is_refused(tmp_path):
  (tmp_path / "texts").mkdir()
  for path, message in [("textz", r"no such file or folder; did you mean '.*/texts'\?"),
                        ("*.jsonl", "matches no file"), ("texts", "is an empty folder")]:
    with pytest.raises(FieldError, match=message):
      texts(tmp_path / path)
  with pytest.raises(FieldError, match="give either files to read or --tfds=NAME"):
    Source()
  with pytest.raises(FieldError, match="tfds_dir=None: is needed with --tfds"):
    Source(tfds="wiki")


def test_the_signature_tells_a_changed_source_from_a_moved_one(tmp_path):
  folder = tmp_path / "a"
  folder.mkdir()
  file = write_json(folder / "x.jsonl", [{"text": "one", "body": "other"}])
  before = sources.make_plan(Source((str(folder),))).signature
  moved = folder.rename(tmp_path / "b")
  assert sources.make_plan(Source((str(moved),))).signature == before
  assert sources.make_plan(Source((str(moved),), text_field="body")).signature != before
  write_json(moved / file.name, [{"text": "two", "body": "other"}])
  assert sources.make_plan(Source((str(moved),))).signature != before
