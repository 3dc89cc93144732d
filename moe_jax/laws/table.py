"""Reads results.csv, and refuses what a fit would be silently wrong on.

Each refusal is one line that names the file, the line in it, and what helps:
`--where=COLUMN=VALUE` keeps some rows, `--without=CELL` leaves a cell out.
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
# One law is of one text and one way of measuring: these may not differ within a fit.
SAME = ("evaluation", "corpus", "tokenizer", "seq_len", "data_fingerprint")
# How a run was trained, beside learning rate and seeds, and the rest of its shape. Runs that
# differ in any of these are no repeats of each other.
RECIPE = ("batch_tokens", "schedule", "warmup_steps", "decay_fraction", "weight_decay",
          "dispatch", "capacity_factor", "routing_group_tokens", "norm_topk_prob",
          "balance_coef", "z_coef", "compute_dtype", "mask_documents")
DETAILS = ("n_heads", "n_kv_heads", "head_dim", "n_shared_experts", "n_dense_layers", "d_dense")
_FINISHED = "finished"


def read_results(path: str | os.PathLike, where: Sequence[str] = (),
                 without: Sequence[str] = ()) -> list[Row]:
  """The rows that a fit may use: numbers as floats, checked.

  Args:
    path: results.csv, local or gs://.
    where: COLUMN=VALUE conditions that rows must meet, as text in the file.
    without: names of cells to leave out.

  Raises:
    FieldError: no such file, missing columns, no rows left, mixed data sets, unfinished
      runs, a loss that is not a positive number, duplicated rows.
  """
  rows = _chosen(_parsed(str(path)), where, without, str(path))
  _check_same(rows, str(path))
  for row in rows:
    _check_row(row, str(path))
  _check_duplicates(rows, str(path))
  return rows


def _parsed(path: str) -> list[Row]:
  from etils import epath
  try:
    text = epath.Path(path).read_text()
  except (OSError, UnicodeDecodeError) as error:
    raise FieldError("results", path, f"cannot be read: {_reason(error)}") from None
  reader = csv.DictReader(io.StringIO(text))
  columns = reader.fieldnames or []
  missing = [name for name in REQUIRED if name not in columns]
  if missing:
    raise FieldError("results", path, f"lacks the column{'s' * (len(missing) > 1)} "
                     + ", ".join(missing))
  rows = [row | {"_line": line} for line, row in enumerate(reader, start=2)]
  if not rows:
    raise FieldError("results", path, "has no rows")
  return rows


def _reason(error: Exception) -> str:
  return getattr(error, "strerror", None) or type(error).__name__


def _chosen(rows: list[Row], where: Sequence[str], without: Sequence[str],
            path: str) -> list[Row]:
  columns = [name for name in rows[0] if name != "_line"]
  for condition in where:
    column, equals, value = condition.partition("=")
    if column not in columns or not equals:
      raise FieldError("where", condition, "must be COLUMN=VALUE; "
                       + did_you_mean(column, columns))
    kept = [row for row in rows if row[column] == value]
    if not kept:
      there = sorted({str(row[column]) for row in rows})
      raise FieldError("where", condition, f"no row of {path} is so; "
                       + did_you_mean(value, there))
    rows = kept
  for name in without:
    if name not in {row["cell"] for row in rows}:
      raise FieldError("without", name, "no such cell; "
                       + did_you_mean(name, [row["cell"] for row in rows]))
  rows = [row for row in rows if row["cell"] not in without]
  if not rows:
    raise FieldError("without", ",".join(without), "leaves no rows")
  return rows


def _check_same(rows: list[Row], path: str) -> None:
  for column in SAME:
    values = sorted({str(row.get(column)) for row in rows})
    if len(values) > 1:
      shown = ", ".join(values[:4]) + (", ..." if len(values) > 4 else "")
      raise FieldError("results", path, f"mixes {column}: {shown}; a law is of one: choose "
                       f"with --where={column}={values[0]}")


def _check_row(row: Row, path: str) -> None:
  at = f"line {row['_line']} (cell {row['cell']})"
  steps = row.get("steps") or row.get("step")
  if row["state"] != _FINISHED or (row.get("step") or steps) != steps:
    raise FieldError("results", path, f"{at} is unfinished: state {row['state']!r}, step "
                     f"{row.get('step')} of {steps}; leave such runs out with "
                     f"--where=state={_FINISHED} or --without={row['cell']}")
  for column in (*_POSITIVE, *_SEEDS):
    try:
      row[column] = float(row[column])
    except (TypeError, ValueError):
      raise FieldError("results", path, f"{at}: {column} is {row[column]!r}, which is no "
                       "number") from None
    if column in _POSITIVE and not (math.isfinite(row[column]) and row[column] > 0):
      raise FieldError("results", path, f"{at}: {column} is {row[column]:g}: must be a "
                       f"finite number above 0; leave it out with --without={row['cell']}")


def _check_duplicates(rows: list[Row], path: str) -> None:
  seen: dict[tuple, Row] = {}
  for row in rows:
    key = tuple(row.get(name) for name in
                (*ARCHITECTURE, "tokens", "learning_rate", *_SEEDS, *RECIPE, *DETAILS))
    if key in seen:
      raise FieldError("results", path, f"lines {seen[key]['_line']} and {row['_line']} "
                       f"(cells {seen[key]['cell']} and {row['cell']}) are the same run "
                       "twice; a repeat needs a seed of its own")
    seen[key] = row
