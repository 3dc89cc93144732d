"""Sections to files: self-contained, escaped, the same bytes every time, and readable."""

import csv
import html.parser
import io
import math

import pytest

from moe_jax.errors import FieldError
from moe_jax.laws.publish import style
from moe_jax.laws.publish.page import Section, publish
from moe_jax.laws.publish.table import Table, readable

TABLE = Table(("name", "count", "size", "why"), (("a<b | c", 12_345, 0.123456789, ""),
                                                 ("d", None, math.nan, "")))


class Page(html.parser.HTMLParser):
  """Tags with their attributes, and whether every tag is closed in its turn."""

  _OPEN_ENDED = {"meta", "img", "br"}

  def __init__(self, text: str):
    super().__init__()
    self.tags, self.text, self._stack = [], "", []
    self.feed(text)
    assert not self._stack

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))
    if tag not in self._OPEN_ENDED:
      self._stack.append(tag)

  def handle_endtag(self, tag):
    assert self._stack.pop() == tag

  def handle_data(self, data):
    self.text += data


def picture():
  figure = style.new_figure(2, 3)
  axes = figure.subplots()
  axes.plot([1, 2], [3, 4])
  style.log_axis(axes, "n_exp", axes.lines[0].get_xdata())
  return figure


def sections():
  return [Section("first", "A <title>", ("One & two", "- item", "- other", "End"), picture(),
                  'a "caption"', TABLE),
          Section("second", "Words only", ("Nothing to draw.",))]


def test_a_page_is_whole_in_itself(tmp_path):
  files = publish(tmp_path / "r.html", "T", ["Lead"], sections())
  assert [file.relative_to(tmp_path).as_posix() for file in files] == [
      "r.html", "r_files/first.png", "r_files/first.csv", "r_files/first.md"]
  page = Page(files[0].read_text())
  assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "iframe", "style src"})
  for _, attributes in page.tags:
    assert attributes.get("src", "data:").startswith("data:image/png;base64,") or (
        "src" not in attributes)
    assert attributes.get("href", "#").startswith("#")
  assert "url(" not in files[0].read_text() and "@import" not in files[0].read_text()
  assert "A <title>" in page.text and "One & two" in page.text and "a<b | c" in page.text
  alts = [attributes["alt"] for tag, attributes in page.tags if tag == "img"]
  assert alts == ['a "caption"']


def test_the_same_sections_give_the_same_bytes(tmp_path):
  one = publish(tmp_path / "one" / "r.html", "T", ["Lead"], sections())
  other = publish(tmp_path / "other" / "r.html", "T", ["Lead"], sections())
  assert [file.read_bytes() for file in one] == [file.read_bytes() for file in other]


def test_nothing_in_a_picture_names_the_software_or_the_time(tmp_path):
  (_, image, *_) = publish(tmp_path / "r.html", "T", [], sections())
  content = image.read_bytes()
  assert content.startswith(b"\x89PNG") and b"tEXt" not in content and b"tIME" not in content


def test_a_table_in_three_dresses():
  rows = list(csv.reader(io.StringIO(TABLE.csv())))
  assert rows == [["name", "count", "size", "why"], ["a<b | c", "12345", "0.12345679", ""],
                  ["d", "", "", ""]]
  assert TABLE.markdown().splitlines()[2] == "| a<b \\| c | 12,345 | 0.12346 |"  # no empty column
  assert '<td class="number">12,345</td>' in TABLE.html() and "<th>why</th>" not in TABLE.html()


@pytest.mark.parametrize("value,text", [
    (3, "3"), (3.0, "3"), (1.5e6, "1,500,000"), (0.000123456, "0.00012346"), (math.nan, ""),
    (None, ""), ("x", "x"), (math.inf, "inf")])
def test_numbers_as_people_read_them(value, text):
  assert readable(value) == text


@pytest.mark.parametrize("name,says", [("r.txt", "must end in .html"), ("r", "must end in .html")])
def test_a_path_that_is_no_page(tmp_path, name, says):
  with pytest.raises(FieldError, match=says):
    publish(tmp_path / name, "T", [], [])


def test_a_path_that_cannot_be_written(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(FieldError, match="cannot be written"):
    publish(tmp_path / "file" / "r.html", "T", [], [])
  (tmp_path / "d.html").mkdir()
  with pytest.raises(FieldError, match="is a directory"):
    publish(tmp_path / "d.html", "T", [], [])
