"""Writes the evaluation of a grid as one self-contained page: losses, routing, cost. No JAX."""

import os
import pathlib
from collections.abc import Sequence
from typing import Any

from moe_jax.errors import FieldError
from moe_jax.evaluate import cost, curves, plot, results, routing_plots
from moe_jax.evaluate.results import INFERENCE, ROUTING, Row
from moe_jax.grid import Cell
from moe_jax.laws.publish.page import Section, check_path, publish
from moe_jax.laws.publish.table import Table
from moe_jax.run_dir import RunDir

_LOSSES = ("cell", "step", "n_total", "n_active", "sparsity", "tokens", "loss", "loss_se",
           "loss_at_capacity", "bits_per_byte", "bits_per_byte_se", "drop_rate", "load_variation",
           "unigram_loss", "identity")


def write(path: str | os.PathLike, cells: Sequence[Cell], out: str | os.PathLike,
          rows: Sequence[Row]) -> list[pathlib.Path]:
  """Writes the page and its files; see page.publish.

  Args:
    path: path of the page, ending in .html.
    cells: the cells to report on.
    out: directory of all experiments.
    rows: the held-out results of the cells, one row each.

  Raises:
    FieldError: the path is invalid, or a file of a run is damaged.
  """
  check_path(path)
  names = [row["cell"] for row in rows]
  dirs = {cell.name: RunDir.of(out, cell) for cell in cells if cell.name in names}
  routing = {name: found for name, run_dir in dirs.items()
             if (found := _read(run_dir, ROUTING)) is not None}
  steps = {name: found for name, run_dir in dirs.items()
           if len(found := _by_step(run_dir)) > 1}
  curve = [row for run_dir in dirs.values() for row in results.curve_rows_of(run_dir, "heldout")]
  sections = [_losses(rows), *_domains(rows), *_curves(curve), *_routing(routing),
              *_training(steps), *_cost(rows)]
  first = rows[0]
  lead = [f"{len(rows)} runs on {first['corpus']} ({first['tokenizer']}), each from its newest "
          f"checkpoint, on {first['heldout_documents']} held-out documents of "
          f"{first['heldout_targets']:,} tokens, dropless unless stated otherwise.",
          plot.caption(rows)]
  return publish(path, f"Evaluation of {first['experiment']}", lead, sections)


def _read(run_dir: RunDir, name: str, step: int | None = None) -> dict[str, Any] | None:
  found = run_dir.read_eval(name, step)
  if found is not None and not (isinstance(found, dict) and isinstance(found.get("step"), int)):
    raise FieldError("out", str(run_dir.path / "eval" / f"{name}.json"), "is damaged: no step")
  return found


def _by_step(run_dir: RunDir) -> list[dict[str, Any]]:
  """Reads the routing evaluations of all checkpoints, by ascending step."""
  found = {told["step"]: told for step in (None, *run_dir.evaluated_steps())
           if (told := _read(run_dir, ROUTING, step)) is not None}
  if found:  # the newest agrees with itself, which eval/routing.json does not store
    newest = found[max(found)]
    newest.setdefault("agreement", [1.0] * len(newest["layers"]))
  return [found[step] for step in sorted(found)]


def _losses(rows: Sequence[Row]) -> Section:
  return Section("losses", "Held-out loss", figure=plot.figure(rows), table=_table(rows, _LOSSES),
                 caption="Loss against sparsity and against the number of experts.")


def _domains(rows: Sequence[Row]) -> list[Section]:
  names = [name for name in rows[0] if name.startswith(("loss.", "bits_per_byte."))]
  names += [name for name in rows[0] if name.startswith(("loss_se.", "bits_per_byte_se."))]
  if not names:
    return []
  return [Section("domains", "By domain", ("Bits per byte compare texts; nats per token do not, "
                                           "because tokens differ in length between texts.",),
                  table=_table(rows, ("cell", *sorted(names))))]


def _curves(rows: Sequence[Row]) -> list[Section]:
  if len({row["step"] for row in rows}) < 2:
    return []
  return [Section("curves", "Loss against step", figure=curves.figure(rows), fold=True,
                  caption="The held-out loss of each checkpoint, dropless; one standard error "
                  "over documents, which are the same for all.",
                  table=_table(rows, ("cell", "step", "tokens", "loss", "loss_se",
                                      "loss_at_capacity", "bits_per_byte", "drop_rate")))]


def _routing(found: dict[str, dict[str, Any]]) -> list[Section]:
  if not found:
    return []
  return [
      Section("load", "Which experts work", (
          "token information: the share of the entropy of a token's expert that is removed by "
          "knowing the token. domain information: the same for knowing the domain of the text. "
          "Both are corrected for small counts.",),
          figure=routing_plots.load_figure(found), table=routing_plots.table(found), fold=True,
          caption="Tokens sent to each expert over the mean of its layer and domain, at the "
          "capacity of training. White is even."),
      Section("company", "Which experts work together", figure=routing_plots.company_figure(found),
              caption="How often two experts of the last layer are chosen for the same token, "
              "relative to chance given their loads: the row's expert, with the column's.")]


def _training(steps: dict[str, list[dict[str, Any]]]) -> list[Section]:
  if not steps:
    return []
  return [Section("specialization", "Specialization over training",
                  figure=routing_plots.training_figure(steps),
                  caption="Means over layers, of the same held-out tokens at each checkpoint. "
                  "Choices as in the newest checkpoint: the share of a token's experts that are "
                  "also among its experts there (router saturation, arXiv 2409.02060).")]


def _cost(rows: Sequence[Row]) -> list[Section]:
  known = cost.measured(rows)
  if not known:
    return []
  names = [name for name in known[0] if name.startswith(
      ("prefill_tokens_per_second_b", "decode_"))]
  one = known[0]
  return [Section(INFERENCE, "Loss against measured cost of inference", (
      f"{one['inference_n_devices']} x {one['inference_device_kind']}, "
      f"{one['inference_dtype']}, contexts of {one['inference_context']} tokens; its memory "
      f"moves {one['memory_bytes_per_second'] / 1e9:.1f} GB/s. limit: time to read the bytes of a "
      "step at that bandwidth; roofline: the estimate of moe_jax.design.",),
      figure=cost.figure(rows),
      caption="A decode step produces one token for each sequence of a batch.",
      table=_table(known, ("cell", "loss", "weight_bytes", "cache_bytes_per_sequence", *names)))]


def _table(rows: Sequence[Row], columns: Sequence[str]) -> Table:
  return Table(tuple(columns), tuple(tuple(row.get(name) for name in columns) for row in rows))
