"""Renders sections to one self-contained HTML file: inline styles and figures, no scripts.

The output is deterministic: it does not depend on the time, the path or the machine.
"""

import base64
import dataclasses
import hashlib
import html
import io
import os
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from moe_jax.errors import FieldError
from moe_jax.laws.publish.table import Table

if TYPE_CHECKING:
  from matplotlib.figure import Figure

_SCALE = 0.75  # CSS pixels per image pixel: keeps figures sharp on high-resolution screens


@dataclasses.dataclass(frozen=True)
class Section:
  """A part of a report.

  Attributes:
    key: name of its files and its anchor, e.g. `residuals`.
    title: heading.
    text: paragraphs; one that begins with "- " is a list item.
    figure: a figure, or None.
    caption: text below the figure: what it shows, and how to read it.
    table: a table, or None.
    fold: whether the table is collapsed until clicked; for long tables.
  """

  key: str
  title: str
  text: tuple[str, ...] = ()
  figure: "Figure | None" = None
  caption: str = ""
  table: Table | None = None
  fold: bool = False


def publish(path: str | os.PathLike, title: str, lead: Sequence[str],
            sections: Sequence[Section]) -> list[pathlib.Path]:
  """Writes the page, and next to it a folder with every figure and table.

  `report.html` gets `report_files/KEY.png`, `KEY.csv` and `KEY.md`.

  Args:
    path: path of the page, ending in .html.
    title: title of the page.
    lead: paragraphs above the first section.
    sections: the sections, in order; their keys must be unique.

  Returns:
    The paths of the files written, the page first.

  Raises:
    FieldError: `path` does not end in .html, or a file cannot be written.
  """
  page = check_path(path)
  folder = page.with_name(page.stem + "_files")
  pictures = {s.key: png(s.figure) for s in sections if s.figure is not None}
  files: dict[pathlib.Path, bytes] = {page: render(title, lead, sections, pictures).encode()}
  for section in sections:
    if section.key in pictures:
      files[folder / f"{section.key}.png"] = pictures[section.key]
    if section.table is not None:
      files[folder / f"{section.key}.csv"] = section.table.csv().encode()
      files[folder / f"{section.key}.md"] = section.table.markdown().encode()
  for file, content in files.items():
    try:
      file.parent.mkdir(parents=True, exist_ok=True)
      partial = file.with_name(f".{file.name}.partial")
      partial.write_bytes(content)
      partial.replace(file)
    except OSError as error:
      raise FieldError("report", str(path), f"{file} cannot be written: {error.strerror}"
                       ) from None
  return list(files)


def check_path(path: str | os.PathLike) -> pathlib.Path:
  """Returns the path of a page. Raises FieldError unless it can name an .html file."""
  page = pathlib.Path(path)
  if page.suffix.lower() not in (".html", ".htm"):
    raise FieldError("report", str(path), "must end in .html")
  if page.is_dir():
    raise FieldError("report", str(path), "is a directory: expected the path of an .html file")
  return page


def png(figure: "Figure") -> bytes:
  """Returns a figure as PNG, without the software's name so that the bytes are reproducible."""
  image = io.BytesIO()
  figure.savefig(image, format="png", metadata={"Software": None})
  return image.getvalue()


def fingerprint(content: bytes) -> str:
  return hashlib.sha256(content).hexdigest()[:16]


def render(title: str, lead: Sequence[str], sections: Sequence[Section],
           pictures: dict[str, bytes]) -> str:
  """Returns the page as HTML; `pictures` maps section keys to PNGs."""
  contents = " · ".join(f'<a href="#{s.key}">{html.escape(s.title)}</a>' for s in sections)
  body = "\n".join(_section(section, pictures.get(section.key)) for section in sections)
  return _PAGE.format(title=html.escape(title), style=_STYLE, lead=_paragraphs(lead),
                      contents=contents, body=body)


def _section(section: Section, picture: bytes | None) -> str:
  parts = [f'<section id="{section.key}">', f"<h2>{html.escape(section.title)}</h2>",
           _paragraphs(section.text)]
  if picture is not None:
    data = base64.b64encode(picture).decode()
    width = round(int.from_bytes(picture[16:20], "big") * _SCALE)  # width in the PNG header
    parts.append(f'<figure><img alt="{html.escape(section.caption or section.title)}" '
                 f'width="{width}" src="data:image/png;base64,{data}">'
                 f"<figcaption>{html.escape(section.caption)}</figcaption></figure>")
  if section.table is not None:
    table = section.table.html()
    n = len(section.table.rows)
    parts.append(f"<details><summary>Table, {n} row{'s' * (n != 1)}</summary>{table}</details>"
                 if section.fold else table)
  return "\n".join(part for part in [*parts, "</section>"] if part)


def _paragraphs(text: Sequence[str]) -> str:
  found, items = [], []
  for line in [*text, ""]:
    if line.startswith("- "):
      items.append(f"<li>{html.escape(line[2:])}</li>")
      continue
    if items:
      found.append("<ul>\n" + "\n".join(items) + "\n</ul>")
      items = []
    if line:
      found.append(f"<p>{html.escape(line)}</p>")
  return "\n".join(found)


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{style}
</style>
</head>
<body>
<main>
<h1>{title}</h1>
{lead}
<nav>{contents}</nav>
{body}
</main>
</body>
</html>
"""

_STYLE = """\
body { margin: 0; background: #fff; color: #1a1a1a;
       font: 16px/1.5 system-ui, "Segoe UI", "Helvetica Neue", Arial, "DejaVu Sans", sans-serif; }
main { max-width: 980px; margin: 0 auto; padding: 24px 20px 64px; }
h1 { font-size: 1.75em; line-height: 1.25; margin: .4em 0 .6em; }
h2 { font-size: 1.25em; margin: 2.2em 0 .5em; padding-top: .5em; border-top: 1px solid #ddd; }
p, ul { max-width: 46em; margin: .6em 0; }
nav { font-size: .9em; margin: 1.4em 0 0; color: #767676; }
a { color: #005a94; }
figure { margin: 1.2em 0; }
img { max-width: 100%; height: auto; display: block; }
figcaption, summary { font-size: .9em; color: #444; max-width: 52em; }
figcaption { margin-top: .4em; }
summary { cursor: pointer; margin: .8em 0; }
.wide { overflow-x: auto; margin: .8em 0; }
table { border-collapse: collapse; font-size: .84em; }
th, td { padding: 3px 9px; border-bottom: 1px solid #e4e4e4; text-align: left;
         vertical-align: top; }
thead th { border-bottom: 2px solid #999; vertical-align: bottom; }
td:first-child { white-space: nowrap; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
@media print { details > * { display: block; } nav { display: none; } }"""
