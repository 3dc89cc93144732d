"""Results shown: results.csv, results.png beside it, and a table on standard output."""

from collections.abc import Sequence

from etils import epath

from moe_jax.evaluate.plot import plot
from moe_jax.evaluate.results import Row, write_csv
from moe_jax.evaluate.table import print_table


def show(rows: Sequence[Row], in_table: Sequence[Row], csv_file: epath.Path) -> list[str]:
  """Writes both files, prints the table and the names of the files.

  Args:
    rows: of all evaluations; those of the held-out split make the picture.
    in_table: those to print.
    csv_file: gets `rows`; the picture has its name, with .png.

  Returns:
    A line for each file that could not be written; that stops neither the other nor the table.
  """
  png_file = csv_file.with_suffix(".png")
  heldout = [row for row in rows if row["evaluation"] == "heldout"]
  written, unwritten = [], []
  files = [(csv_file, lambda: write_csv(csv_file, rows))]
  if heldout:
    files.append((png_file, lambda: plot(heldout, png_file)))
  for file, write in files:
    try:
      write()
      written.append(file)
    except OSError as error:
      unwritten.append(f"{file.name}: not written: {error}")
  print_table(in_table)
  print(*written, sep="\n")
  return unwritten
