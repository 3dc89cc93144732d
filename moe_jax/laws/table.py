"""Reads results.csv, and rejects input on which a fit would be silently wrong.

The error message is one line that names the file, the line in it and the remedy:
`--where=COLUMN=VALUE` keeps only matching rows, `--without=CELL` omits a cell. Runs without a
result (unfinished, diverged, a loss that is not finite) and runs omitted on purpose are kept with
the reason under UNUSED, and every report lists them.
"""

import csv
import io
import math
import os
from collections.abc import Sequence
from typing import Any

from moe_jax.errors import FieldError, did_you_mean

Row = dict[str, Any]

ARCHITECTURE = ("n_layers", "d_model", "d_expert", "n_exp", "n_topk", "n_total", "n_active")
_POSITIVE = (*ARCHITECTURE, "tokens", "learning_rate", "loss")
_SEEDS = ("seed_init", "seed_data")
REQUIRED = ("cell", "state", *_POSITIVE, *_SEEDS)
# A law holds for one text and one evaluation: these columns may not differ within a fit.
SAME = ("evaluation", "corpus", "tokenizer", "seq_len", "data_fingerprint")
# How a run was trained, other than learning rate and seeds. Runs of one architecture that differ
# in any of RECIPE, RECIPE_HASH or DETAILS (the rest of its shape) are not repeats of each other.
RECIPE = ("batch_tokens", "schedule", "warmup_steps", "decay_fraction", "weight_decay",
          "dispatch", "capacity_factor", "routing_group_tokens", "norm_topk_prob", "router",
          "bias_update_rate", "jitter", "drop_order", "balance_coef", "z_coef", "compute_dtype",
          "mask_documents", "vocab_size", "tie_embeddings", "qk_norm", "init_from")
# Hash of the whole recipe, including settings that have no column (evaluate.results.recipe_hash).
# Older tables lack it.
RECIPE_HASH = "recipe_hash"
NOT_ROUTED = ("n_shared_experts", "n_dense_layers")  # always active, like attention
DETAILS = ("n_heads", "n_kv_heads", "head_dim", *NOT_ROUTED, "d_dense")
UNUSED = "_unused"  # why a row is not part of the fit; absent from the rows that are
LEFT_OUT = "left out by"  # prefix of that reason if a flag excluded the row
_FINISHED = "finished"


def read_results(path: str | os.PathLike | Sequence[str], where: Sequence[str] = (),
                 without: Sequence[str] = ()) -> list[Row]:
  """Reads all rows, with numbers as floats; rows that a fit may not use are marked UNUSED.

  Args:
    path: results.csv, local or gs://, or several with the same text and evaluation.
    where: COLUMN=VALUE conditions that rows must meet, compared as text.
    without: names of cells to omit.

  Raises:
    FieldError: no such file, not a CSV, missing columns, no usable row, mixed datasets, a value
      that is not a number, duplicate rows.
  """
  paths = [str(path)] if isinstance(path, str | os.PathLike) else list(path)
  rows, path = [row for one in paths for row in _parsed(one)], ", ".join(paths)
  _choose(rows, where, without, path)
  for row in rows:
    _check_row(row, path)
  used = [row for row in rows if UNUSED not in row]
  if not used:
    raise FieldError("results", path, f"has no usable run, e.g. {rows[0]['cell']}: "
                     f"{rows[0][UNUSED]}")
  _check_same(used, path)
  _check_duplicates(used, path)
  return rows


def _parsed(path: str) -> list[Row]:
  from etils import epath
  try:
    text = epath.Path(path).read_text()
  except UnicodeDecodeError:
    raise FieldError("results", path, "is not a text file: expected a results.csv") from None
  except OSError as error:
    raise FieldError("results", path, f"cannot be read: {_reason(error)}") from None
  try:
    reader = csv.DictReader(io.StringIO(text), strict=True)
    rows = [row | {"_line": line} for line, row in enumerate(reader, start=2)]
  except csv.Error as error:
    raise FieldError("results", path, f"is not a CSV: {error}") from None
  if not reader.fieldnames:
    raise FieldError("results", path, "is empty")
  missing = [name for name in REQUIRED if name not in reader.fieldnames]
  if missing:
    raise FieldError("results", path, f"lacks the column{'s' * (len(missing) > 1)} "
                     + ", ".join(missing))
  if not rows:
    raise FieldError("results", path, "has no rows")
  for row in rows:
    if None in row or None in row.values():
      raise FieldError("results", path, f"line {row['_line']} does not have the header's "
                       f"{len(reader.fieldnames)} fields: the file is truncated or damaged")
  return rows


def _reason(error: Exception) -> str:
  return getattr(error, "strerror", None) or type(error).__name__


def _choose(rows: list[Row], where: Sequence[str], without: Sequence[str], path: str) -> None:
  """Marks the rows that the conditions exclude."""
  columns = [name for name in rows[0] if name != "_line" and all(name in row for row in rows)]
  for condition in where:
    column, equals, value = condition.partition("=")
    if column not in columns or not equals:
      raise FieldError("where", condition, "must be COLUMN=VALUE; "
                       + did_you_mean(column, columns))
    there = sorted({str(row[column]) for row in rows if UNUSED not in row})
    if value not in there:
      raise FieldError("where", condition, f"matches no row of {path}; "
                       + did_you_mean(value, there))
    for row in rows:
      if row[column] != value:
        row.setdefault(UNUSED, f"{LEFT_OUT} --where={condition}: {column} is {row[column]}")
  for name in without:
    if name not in {row["cell"] for row in rows}:
      raise FieldError("without", name, "no such cell; "
                       + did_you_mean(name, [row["cell"] for row in rows]))
  for row in rows:
    if row["cell"] in without:
      row.setdefault(UNUSED, f"{LEFT_OUT} --without={row['cell']}")
  if all(UNUSED in row for row in rows):
    raise FieldError("without", ",".join(without), "leaves no rows")


def _check_same(rows: list[Row], path: str) -> None:
  for column in SAME:
    values = sorted({str(row.get(column)) for row in rows})
    if len(values) > 1:
      shown = ", ".join(values[:4]) + (", ..." if len(values) > 4 else "")
      raise FieldError("results", path, f"mixes {column}: {shown}; a law is fitted to a "
                       f"single {column}: choose with --where={column}={values[0]}")


def differing(rows: Sequence[Row], columns: Sequence[str]) -> list[str]:
  """Returns the columns in which rows differ, or RECIPE_HASH if only their recipe hashes do."""
  found = [name for name in columns if len({str(row.get(name)) for row in rows}) > 1]
  return found or [RECIPE_HASH] * (len({str(row.get(RECIPE_HASH)) for row in rows}) > 1)


def _check_row(row: Row, path: str) -> None:
  """Converts a row's numbers to floats, and marks the row UNUSED if it has no result."""
  at = f"line {row['_line']} (cell {row['cell']})"
  steps = row.get("steps") or row.get("step")
  if row["state"] != _FINISHED or (row.get("step") or steps) != steps:
    error = f" ({row['error']})" if row.get("error") else ""
    row.setdefault(UNUSED, f"unfinished: state {row['state']!r}{error}, step "
                   f"{row.get('step') or 'unknown'} of {steps or 'unknown'}")
  if row.get("causal") == "False":
    row.setdefault(UNUSED, "its router is not causal, so its loss uses future tokens")
  for column in (*_POSITIVE, *_SEEDS):
    text = row[column].strip()
    if column == "loss" and text.lower() in ("", "none", "nan", "inf", "+inf", "-inf"):
      row.setdefault(UNUSED, f"loss is {text or 'missing'}")
      row[column] = math.nan
      continue
    try:
      row[column] = float(text)
    except ValueError:
      if UNUSED not in row:
        raise FieldError("results", path, f"{at}: {column} is {text!r}, not a "
                         "number") from None
      row[column] = math.nan
    if (UNUSED not in row and column in _POSITIVE
        and not (math.isfinite(row[column]) and row[column] > 0)):
      raise FieldError("results", path, f"{at}: {column} is {row[column]:g}: must be a "
                       "finite number above 0")


def _check_duplicates(rows: list[Row], path: str) -> None:
  seen: dict[tuple, Row] = {}
  for row in rows:
    key = tuple(row.get(name) for name in
                (*ARCHITECTURE, "tokens", "learning_rate", *_SEEDS, *RECIPE, RECIPE_HASH,
                 *DETAILS))
    if key in seen:
      raise FieldError("results", path, f"lines {seen[key]['_line']} and {row['_line']} "
                       f"(cells {seen[key]['cell']} and {row['cell']}) are the same run; "
                       "a repeat needs a different seed")
    seen[key] = row
