"""Compares the losses of two cells over the same documents, with a confidence interval."""

import io
import math
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from moe_jax.errors import FieldError, did_you_mean, require
from moe_jax.evaluate.estimate import ratio
from moe_jax.files import write_bytes
from moe_jax.grid import Cell
from moe_jax.run_dir import RunDir

LEVEL = 0.95


class Difference(NamedTuple):
  """Loss of A minus loss of B.

  Attributes:
    unit: `nats per token`, or `bits per byte` where tokens differ.
    value: over all documents; below 0 where A is better.
    low, high: confidence interval at LEVEL; None for a single document.
    documents: number of documents.
    better: number of documents on which A is better.
    alone: standard error the difference would have unpaired, over independent documents.
    se: standard error of the paired difference.
  """

  unit: str
  value: float
  low: float | None
  high: float | None
  documents: int
  better: int
  alone: float | None
  se: float | None


def write_documents(run_dir: RunDir, name: str, result: dict[str, Any], documents) -> None:
  """Writes an evaluation's per-document measurements (heldout.Documents) and its checkpoint."""
  content = io.BytesIO()
  np.savez_compressed(content, checkpoint=str(result["checkpoint"]), step=result["step"],
                      fingerprint=result["data_fingerprint"], **documents._asdict())
  write_bytes(run_dir.documents(name), content.getvalue())


def read_documents(run_dir: RunDir, name: str,
                   result: dict[str, Any]) -> dict[str, np.ndarray] | None:
  """Reads what was written with `result`; None if missing, damaged or of another checkpoint."""
  try:
    with np.load(io.BytesIO(run_dir.documents(name).read_bytes())) as arrays:
      found = {key: arrays[key] for key in arrays.files}
  except Exception:  # numpy raises many types for a damaged file
    return None
  same = (str(found.get("checkpoint")), found.get("step")) == (
      str(result["checkpoint"]), result["step"])
  return found if same else None


def difference(a: dict[str, np.ndarray], b: dict[str, np.ndarray],
               chosen_D: np.ndarray | None = None) -> Difference:
  """Returns the paired difference of A and B, over all documents or only those in `chosen_D`.

  The difference of two ratios with the same denominator is itself a ratio, of the per-document
  differences in nats, so estimate.ratio gives its error: what makes a document hard for both
  models cancels. The interval is Student's t with (documents - 1) degrees of freedom. It covers
  the choice of documents, not of seeds.
  """
  from scipy import stats
  if chosen_D is None:
    chosen_D = np.ones(len(a["bytes_D"]), bool)
  a, b = ({key: value[chosen_D] for key, value in side.items() if key.endswith("_D")}
          for side in (a, b))
  same_tokens = np.array_equal(a["targets_D"], b["targets_D"])
  size_D = a["targets_D"] if same_tokens else a["bytes_D"] * math.log(2)
  delta_D = a["nats_D"] - b["nats_D"]
  found = ratio(delta_D, size_D)
  low = high = alone = None
  if found.se is not None:
    reach = float(stats.t.ppf((1 + LEVEL) / 2, len(size_D) - 1)) * found.se
    low, high = found.value - reach, found.value + reach
    alone = math.hypot(ratio(a["nats_D"], size_D).se, ratio(b["nats_D"], size_D).se)
  return Difference("nats per token" if same_tokens else "bits per byte", found.value, low, high,
                    len(size_D), int((delta_D < 0).sum()), alone, found.se)


def same_documents(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
  """Whether two evaluations are of the same text, possibly with different tokenizers."""
  if np.array_equal(a["targets_D"], b["targets_D"]):
    return str(a["fingerprint"]) == str(b["fingerprint"])
  return np.array_equal(a["bytes_D"], b["bytes_D"])


def parse_pair(text: str, names: list[str]) -> tuple[str, str]:
  """`CELL_A,CELL_B` -> both names. Raises FieldError."""
  parts = [part.strip() for part in text.split(",")]
  require(len(parts) == 2 and parts[0] != parts[1], "compare", text,
          "must be two different cells: CELL_A,CELL_B")
  for part in parts:
    if part not in names:
      raise FieldError("compare", part, "no such cell among those of --config; "
                       + did_you_mean(part, names))
  return parts[0], parts[1]


def compare(out: str | os.PathLike, cells: Sequence[Cell], pair: tuple[str, str],
            name: str) -> list[str]:
  """Returns the lines that compare two cells on the evaluation `name`.

  Raises:
    FieldError: a cell has no such evaluation, or their documents differ.
  """
  by_name = {cell.name: RunDir.of(out, cell) for cell in cells}
  sides, labels = [], []
  for cell in pair:
    run_dir = by_name.get(cell)
    result = run_dir and run_dir.read_eval(name)
    found = read_documents(run_dir, name, result) if result else None
    if found is None:
      raise FieldError("compare", cell, f"has no evaluation on {name}" if not result else
                       f"has an evaluation on {name} whose {run_dir.documents(name).name} is "
                       "missing or damaged: evaluate it again")
    sides.append(found)
    labels = list(result["domains"])
  if not same_documents(*sides):
    raise FieldError("compare", ",".join(pair), "were not evaluated on the same documents")
  domain_D = sides[0]["domain_D"]
  return report(*pair, name, difference(*sides), {
      label: difference(*sides, domain_D == number) for number, label in enumerate(labels)
      if (domain_D == number).any()})


def report(cell_a: str, cell_b: str, name: str, whole: Difference,
           domains: dict[str, Difference]) -> list[str]:
  """Formats the differences, overall and by domain, as lines of text."""
  lines = [f"{cell_a} minus {cell_b}, {name}, {whole.documents} documents:"]
  for label, found in [("all", whole), *(domains.items() if len(domains) > 1 else ())]:
    line = f"  {label}: {found.value:+.4f} {found.unit}"
    if found.se is not None:
      verdict = ("no difference shown" if found.low <= 0 <= found.high
                 else f"{cell_a if found.value < 0 else cell_b} is better")
      line += (f", {100 * LEVEL:g} % interval {found.low:+.4f} to {found.high:+.4f}: {verdict}; "
               f"standard error {found.se:.4f}, unpaired {found.alone:.4f}")
    lines.append(line + f"; {cell_a} is better in {found.better} of {found.documents}")
  return [*lines, "  intervals cover the choice of documents, not of seeds"]
