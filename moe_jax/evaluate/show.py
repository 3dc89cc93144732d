"""Writes results.csv and results.png next to it, and prints a table."""

from collections.abc import Sequence

from etils import epath

from moe_jax.evaluate.plot import plot
from moe_jax.evaluate.results import Row, write_csv
from moe_jax.evaluate.table import print_table


def show(rows: Sequence[Row], in_table: Sequence[Row], csv_file: epath.Path) -> list[str]:
  """Writes both files, then prints the table and the paths of the files.

  Args:
    rows: rows of all evaluations; the figure shows those of the held-out split.
    in_table: rows to print.
    csv_file: path of the CSV file; the figure gets the same name with .png.

  Returns:
    A line for each file that could not be written; the rest is still written and printed.
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
